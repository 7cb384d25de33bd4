"""The records that a report is made of.

Scores are raw (not divided by the size of the training set). Letters: N scanned sequences, T
tokens, L tracked layers in the order of the forward pass.
"""

from dataclasses import dataclass, field

import numpy as np

from ..errors import ArgumentError
from ..stages.scores import Heads
from ..stages.trust import SPARSE, sparsity
from .statistics import Array


@dataclass(frozen=True, eq=False)
class RankedSequence:
    """A training sequence among the strongest of a query.

    index             its place in the data set
    score             raw influence on the query's log-probability, positive = raises it
    tokens            T pieces of text; bytes that are no UTF-8 as `surrogateescape` leaves them
    per_token         [T], sums to the score; position t predicts token t + 1 (paper Eq. 31)
    per_layer         [L], sums to the score (paper Eq. 30)
    per_layer_token   [L,T] or None, sums to both
    source            where it comes from, for the reader: file and line, URL, title
    candidate_rank    its place among the candidates, from 1; None in a full scan
    per_target        [T] of each output token, sums to the score (Eq. 34-36); or None
    per_input         [T] of each input token (Eq. 37-38); or None
    heads             of attention matrices
    turns             of a conversation: (its first token, whose it is) of every turn, in order
    group             what its record has in the column that the report can be filtered by
    """

    index: int
    score: float
    tokens: tuple[str, ...]
    per_token: Array
    per_layer: Array
    per_layer_token: Array | None = None
    source: str = ""
    candidate_rank: int | None = None
    per_target: Array | None = None
    per_input: Array | None = None
    heads: tuple[Heads, ...] = ()
    turns: tuple[tuple[int, str], ...] = ()
    group: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        T, L = len(self.tokens), len(self.per_layer)
        matrix = self.per_layer_token
        for name in ("per_token", "per_target", "per_input"):
            shape = np.shape(values := getattr(self, name))
            if values is not None and shape != (T,):
                raise ArgumentError(
                    f"sequence {self.index}: {T} tokens, but {name} has shape {shape}"
                )
        if matrix is not None and np.shape(matrix) != (L, T):
            raise ArgumentError(
                f"sequence {self.index}: per_layer_token must be [L,T] = {(L, T)}, "
                f"got {np.shape(matrix)}"
            )

    @property
    def kinds(self) -> tuple[Array, ...]:
        """[T] by position and, where they are known, by output and by input token."""
        if self.per_target is None or self.per_input is None:
            return (self.per_token,)
        return self.per_token, self.per_target, self.per_input

    @property
    def sparsity(self) -> float:
        """Of its tokens."""
        return sparsity(self.per_token)

    @property
    def sparse(self) -> bool:
        """One or two tokens carry it, likely spurious (paper 5.3)."""
        return self.sparsity > SPARSE


@dataclass(frozen=True, eq=False)
class QueryResult:
    """One query and what the scan found for it.

    log_probability   of the whole completion given the prompt, in nats; or what `measured` says
    further           more passages, (prompt, completion): other sides, other members of a set
    measured          what is asked, where it is no completion's log-probability
    ranked, bottom    the strongest sequences, best first; the most negative, lowest first
    scores            [N] raw, NaN = never scanned; None where only the strongest were kept
    """

    name: str
    prompt_tokens: tuple[str, ...]
    completion_tokens: tuple[str, ...]
    log_probability: float
    ranked: tuple[RankedSequence, ...]
    bottom: tuple[RankedSequence, ...] = ()
    scores: Array | None = field(default=None, repr=False)
    further: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    measured: str = ""

    @property
    def predicted(self) -> int:
        """Tokens of all completions."""
        return len(self.completion_tokens) + sum(len(tokens) for _, tokens in self.further)

    def beyond(self, train_size: int) -> str:
        """What is to be said where the first score is more than log p can rise; else nothing."""
        first = self.ranked[0].score if self.ranked and not self.measured else 0.0
        return beyond(first / train_size, self.log_probability)


def beyond(change: float, log_probability: float) -> str:
    """What is to be said where log p of a completion would rise above 0, both in nats; else
    nothing.
    """
    if change <= -log_probability:
        return ""
    return (
        f"{change:+.2f} nats is more than log p = {log_probability:.2f} can rise: read these "
        "scores as a ranking, not as sizes (few training sequences, or too small a damping)"
    )


@dataclass(frozen=True)
class StageTime:
    """Wall time of a stage, and of the plain forward + backward over the same batches, seconds."""

    name: str
    seconds: float
    floor_seconds: float | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a reader must know to judge the numbers.

    layers          names of the L tracked layers, in the order of the forward pass
    damping         [L] absolute; `damping_rule` says in words where the values come from
    rank            of the query gradients; None = full
    factor_*        what the factors were fitted on
    train_size      N of the scale 1/N
    scanned         sequences whose influence was computed
    settings        further (name, value) rows
    trust           one line on how far the scores can be trusted
    unattributed    why nothing is said of output and input tokens, where it should be
    grouped_by      the column that sequences can be filtered by, or nothing
    notes           sentences on what is weak about this run
    """

    model: str
    layers: tuple[str, ...]
    damping: tuple[float, ...]
    damping_rule: str
    rank: int | None
    factor_sequences: int
    factor_tokens: int
    train_size: int
    scanned: int
    stages: tuple[StageTime, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    trust: str = ""
    unattributed: str = ""
    grouped_by: str = ""
