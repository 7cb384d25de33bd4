"""A folder of scores, with its model's tokenizer and data, as what a report shows."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import QueryResult, RankedSequence, RunFacts, Stage
from .data import Tokens
from .factors import Factors
from .queries import Queries
from .scores import Detail, Scores
from .tasks import IGNORED

LOW_ENERGY = 0.9  # below this share of its energy a rank does not represent a query


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token by itself; bytes that are no UTF-8 become surrogates."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    table = _byte_of_character() if _byte_level(tokenizer) else None
    special = set(tokenizer.all_special_tokens)
    return tuple(p if p in special else _text(p, table) for p in pieces)


def collect(
    scores: Scores,
    queries: Queries,
    data: Tokens,
    tokenizer: Any,
    names: Sequence[str],
    k: int = 10,
) -> tuple[QueryResult, ...]:
    """What was found for every query: its top and lowest sequences with their detail."""
    return tuple(
        _query(q, scores, queries, data, tokenizer, name, k) for q, name in enumerate(names)
    )


def facts(
    scores: Scores,
    factors: Factors,
    queries: Queries,
    model: str,
    damping_rule: str,
    stages: Sequence[Stage],
    settings: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> RunFacts:
    """How the scores came about; notes say what is weak about them."""
    least = min(float(x.energy.min()) for x in queries.layers)
    if least < LOW_ENERGY:
        notes = (
            *notes,
            f"Rank {queries.rank} keeps as little as {least:.0%} of a preconditioned gradient's "
            "energy in some layer: trust no small differences; a higher rank helps.",
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
    )


def _query(
    q: int, scores: Scores, queries: Queries, data: Tokens, tokenizer: Any, name: str, k: int
) -> QueryResult:
    ids, labels = queries.examples[q]
    asked = int((labels == IGNORED).sum())
    texts = token_texts(tokenizer, ids.tolist())
    full = scores.store.facts["top_k"] is None
    ranked = [_ranked(d, data, tokenizer) for d in scores.details(q)[:k]]
    lowest = [d for d in scores.details(q, lowest=True) if d.score < 0]
    return QueryResult(
        name=name,
        prompt_tokens=texts[:asked],
        completion_tokens=texts[asked:],
        log_probability=-float(queries.measurements[q]),
        ranked=tuple(ranked),
        bottom=tuple(_ranked(d, data, tokenizer) for d in lowest[:k]),
        scores=np.asarray(scores.matrix[q]) if full else None,
    )


def _ranked(detail: Detail, data: Tokens, tokenizer: Any) -> RankedSequence:
    ids = data[detail.index]["input_ids"][: detail.per_layer_token.shape[1]]
    return RankedSequence(
        index=detail.index,
        score=detail.score,
        tokens=token_texts(tokenizer, ids.tolist()),
        per_token=detail.per_token,
        per_layer=detail.per_layer,
        per_layer_token=detail.per_layer_token,
        source=Path(data.source(detail.index)).name,
        candidate_rank=detail.candidate_rank,
    )


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's stand-ins for bytes, inverted: printable ones are themselves, others are 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"ByteLevel"' in json.dumps(
        json.loads(backend.to_str()).get("decoder")
    )


def _text(piece: str, table: dict[str, int] | None) -> str:
    if table is not None and all(c in table for c in piece):
        return bytes(table[c] for c in piece).decode("utf-8", "surrogateescape")
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
    return piece.replace("\u2581", " ")
