"""Training sequences scored against queries: one pass over the data, whatever the number of
queries.

score_qb = sum over layers of <P_q, G_b>, with the preconditioned query gradient P_q in weight space
and the sequence's gradient G_b, which is never formed. Raw scores: no 1/N, positive = the sequence
raises the completion's log-probability (for `LanguageModelTask`).
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import flag, instance, path, require, whole
from ..curvature.basis import SharedRotation
from ..curvature.choice import contraction
from ..curvature.memory import free_bytes
from ..curvature.query_gradients import Dense, QueryGradients
from ..data.examples import Indexable
from ..errors import ArgumentError, StoreError
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..ops.shapes import Shape
from ..store.fingerprint import fingerprint
from ..store.folder import Store
from ..store.results import check_results
from .attribution import thin
from .candidates import top_candidates
from .consumer import Batch, Consumer
from .damping import check_damping
from .detail import explain, remove_pieces
from .factors import Factors, bases, check_loss
from .heap import Heap
from .kept import Best, WholeMatrix
from .parts import Tally, add_scores, add_self_influence, check_scores
from .processes import Processes
from .queries import LayerQueries, Queries
from .run import Run, RunArguments, Stage, accumulator
from .scores import Scores
from .trial import reading_as
from .trust import trust_in

# Top and lowest sequences of each query whose token and layer detail is worked out; `top_k` says
# otherwise.
DETAILED, LOWEST = 20, 5
# Of the free memory, what queries may take while they are dense for all of a scan.
SHARE_OF_A_STAGE = 0.5


@torch.inference_mode(False)
def score(
    model: nn.Module,
    queries: Queries,
    dataset: Indexable,
    *,
    out: str | Path,
    per_token: bool = False,
    per_layer: bool = False,
    attribution: bool = False,
    top_k: int | None = None,
    candidates: str | Sequence[Sequence[int]] | None = None,
    train_size: int | None = None,
    query_shards: int = 1,
    **arguments: Unpack[RunArguments],
) -> Scores:
    """Score every sequence of `dataset` against every query, into the folder `out`.

    A scan that was killed continues where it was, and ends in bitwise the same scores.

    Args:
        model: the model the queries were prepared on.
        queries: from `prepare_queries`.
        dataset: indexable examples; see `Batches`.
        out: folder of this scan.
        per_token, per_layer: work out, in a second pass over them alone, the layer x token detail
            of each query's top and lowest sequences (`Scores.details`).
        attribution: in that pass, output and input tokens, too: a second derivative, at one and a
            half times a scan's pass a query and sequence. May be asked for later, of a finished
            folder with details; `Scores.unattributed` says why there are none.
        top_k: keep a bounded heap per query in place of the [Q,N] matrix.
        candidates: "tfidf:10000" for the paper's filter (Eq. 28), or indices per query; sequences
            that are nobody's candidate are not scanned.
        train_size: N by which a display divides; None: the size of `dataset`.
        query_shards: of several processes, how many share the queries out, each with a part of
            them on its device, and pass the same batches; for queries that do not fit one.
        arguments: see `RunArguments`.

    Raises:
        StoreError: `out` was begun with other settings; names each difference.
        ArgumentError: the queries belong to another model, or candidates do not fit.
        NotFiniteError: a loss or a score is not finite; names the examples.
    """
    top_k = None if top_k is None else whole("top_k", top_k)
    out = path("out", out)
    instance("queries", queries, Queries, "what prepare_queries returns")
    for name, value in (
        ("per_token", per_token), ("per_layer", per_layer), ("attribution", attribution)
    ):  # fmt: skip
        flag(name, value)
    detail = per_token or per_layer or attribution
    with reading_as((queries.facts or {}).get("fitted"), arguments):
        run = Run(model, dataset, arguments, processes=Processes.here())
    shards = whole("query_shards", query_shards, 1, len(queries))
    ranked = _candidates(candidates, queries, run)
    facts = _facts(run, train_size) | {
        "queries": queries.identity,
        "layers": [q.layer.name for q in queries.layers],
        "top_k": top_k,
        "candidates": None if ranked is None else fingerprint([c.tolist() for c in ranked]),
        "detail": detail,
    }
    queries.check_run(facts, "score")
    with run.opened(out, "scores", facts) as store:
        layers = [q.layer for q in queries.layers]
        gradients = None
        check_results(store)
        if not store.finished:
            chosen = None if ranked is None else [np.unique(indices) for indices in ranked]
            with run.processes.sharing(shards):
                own = run.processes.part(len(queries))
                gradients = on_device(run, queries, own)
                add = adding(gradients)
                _scan(run, layers, len(queries), store, chosen, top_k, add, own)
            gradients = gradients if shards == 1 else None
        later = run.processes.from_first(attribution and store.state.get("attribution") is None)
        if detail and (later or not store.finished):
            order = ranked if isinstance(candidates, str) else None
            counts = (top_k or DETAILED, 0 if top_k else LOWEST)
            with store.threads():
                placed = thin(run, queries, gradients)
                explain(run, layers, placed, store, counts, order, attribution)
        if store.finished and later:
            store.update(seconds=store.state["seconds"] | run.seconds)
        elif not store.finished:
            asked = {"asked": queries.facts["data"]} if queries.facts else {}
            store.update(trust=trust_in(queries), **asked)
            _finish(store, run)
        if run.processes.first:
            # Not before: a kill between would have them worked out again.
            remove_pieces(store)
    return Scores(out)


@torch.inference_mode(False)
def self_scores(
    model: nn.Module,
    factors: Factors,
    dataset: Indexable,
    *,
    out: str | Path,
    damping: float | str | None = None,
    train_size: int | None = None,
    **arguments: Unpack[RunArguments],
) -> Scores:
    """g^T (G + damping)^-1 g of every sequence's training gradient: a matrix of one row, into
    `out`.

    Arguments and errors as in `score`; `damping` as in `prepare_queries`.
    """
    damping = check_damping(damping)
    out = path("out", out)
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    layers = factors.layers(model)
    with reading_as((factors.facts or {}).get("task"), arguments):
        run = Run(model, dataset, arguments, processes=Processes.here())
    facts = _facts(run, train_size) | {
        "factors": factors.identity,
        "layers": [layer.name for layer in layers],
        "damping": damping,
        "top_k": None,
    }
    factors.check_run(facts, "self_scores")
    check_loss((factors.facts or {}).get("task"), facts, "self_scores")
    with run.opened(out, "self", facts) as store:
        check_results(store)
        if not store.finished:
            dampings = factors.dampings(layers, damping)
            placed = bases(factors, layers, dampings, run.dtype, run.places(layers))
            rotate = SharedRotation()

            def add(s: Tensor, seen: LayerBatch) -> None:
                basis = placed[seen.layer.name].at(seen.g.device)
                add_self_influence(s[0], seen, basis, rotate)

            _scan(run, layers, 1, store, None, None, add)
            _finish(store, run)
    return Scores(out)


def _facts(run: Run, train_size: int | None) -> dict[str, Any]:
    size = run.batches.size if train_size is None else whole("train_size", train_size)
    return run.facts() | {"train_size": size}


def _finish(store: Store, run: Run) -> None:
    store.finish(
        ["plan.safetensors", *(["scores.done"] if store.facts["top_k"] is None else [])],
        truncated=run.batches.truncated,
        without_targets=run.batches.without_targets,
        seconds=run.seconds,
    )


def _candidates(
    wanted: str | Sequence[Sequence[int]] | None, queries: Queries, run: Run
) -> list[np.ndarray] | None:
    """Candidate indices of every query, TF-IDF's best first, or None for all."""
    if wanted is None:
        return None
    batches = run.batches
    if isinstance(wanted, str):
        kind, _, count = wanted.partition(":")
        if kind != "tfidf" or not count.isdecimal() or len(count) > 18 or not int(count):
            raise ArgumentError(
                f"candidates is {wanted!r}, expected 'tfidf:COUNT' or indices per query"
            )
        if not batches.language or batches.vocabulary is None or not queries.examples:
            raise ArgumentError("candidates by TF-IDF need a language model with an embedding")
        tokens = [ids.tolist() for ids, _ in queries.examples]
        best = top_candidates(
            tokens, batches.dataset, int(count), batches.vocabulary, context=batches.context,
            form=batches.form,
        )[0]  # fmt: skip
        wanted = best.tolist()
    listed = isinstance(wanted, Sequence) or (isinstance(wanted, np.ndarray) and wanted.ndim)
    listed = bool(listed) and all(map(_are_indices, wanted))
    require(listed, "candidates", wanted, "'tfidf:COUNT' or indices per query")
    if len(wanted) != len(queries):
        raise ArgumentError(f"candidates for {len(wanted)} queries, but there are {len(queries)}")
    found = [np.asarray(indices, dtype=np.int64) for indices in wanted]
    for q, indices in enumerate(found):
        if len(indices) and not 0 <= indices.min() <= indices.max() < batches.size:
            raise ArgumentError(f"query {q}: a candidate is outside the data set of {batches.size}")
    return found


def _are_indices(values: Any) -> bool:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):
        return False
    return array.ndim == 1 and (array.dtype.kind in "iu" or not len(array))


def _scan(
    run: Run,
    layers: Sequence[Layer],
    Q: int,
    store: Store,
    chosen: list[np.ndarray] | None,
    top_k: int | None,
    add: Callable[[Tensor, LayerBatch], None],
    own: slice = slice(None),
) -> None:
    """One pass over the data: add(s [Q,B], LayerBatch) for every layer of every batch; of a process
    that has its `own` queries, for those.
    """
    batches = run.planned(store)
    scanned = batches
    if chosen is not None:
        wanted = np.zeros(run.batches.size, dtype=bool)
        wanted[np.concatenate(chosen)] = True
        scanned = batches.only(wanted)
    consumer = Scan(run, store, Q, batches, chosen, top_k, add, own)
    run.each(Stage.SCAN, layers, scanned, consumer, done=consumer.done)
    consumer.collect()
    if not run.processes.first:
        return
    if lacking := sorted({*range(len(batches))} - {*consumer.kept.counted()}):
        raise StoreError(
            f"{store.folder}: {len(lacking)} of {len(batches)} batches (the first is "
            f"{lacking[0]}) are not marked as done, though the scan has come to its end. Run it "
            "again to continue"
        )


class Scan(Consumer):
    """Scores of a batch, into the matrix or the heap.

    The first process has the matrix; others leave their columns in pieces, and it takes them in.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        Q: int,
        batches: Sequence[Sequence[int]],
        chosen: list[np.ndarray] | None,
        top_k: int | None,
        add: Callable[[Tensor, LayerBatch], None],
        own: slice = slice(None),
    ) -> None:
        self.run, self.store, self.batches = run, store, batches
        self.chosen, self._add = chosen, add
        dtype = accumulator(run.model)
        self.tally = Tally(len(range(Q)[own]), dtype)
        shape, kind = (Q, run.batches.size), "float64" if dtype == torch.float64 else "float32"
        self.kept: WholeMatrix | Best
        if top_k is None:
            self.kept = WholeMatrix(run.processes, store, batches, shape, kind)
        else:
            empty = Heap.empty(Q, min(top_k, run.batches.size), dtype)
            self.kept = Best(run.processes, store, empty)
        self.done = self.kept.done
        run.seconds[Stage.SCAN] = self.kept.seconds

    def begin(self, batch: Batch) -> None:
        """No scores yet."""
        self.tally.begin()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer's share."""
        self._add(self.tally.on(seen.g.device, len(batch.indices)), seen)

    def end(self, batch: Batch) -> None:
        """The scores of a batch, NaN where a sequence is not a query's candidate."""
        s, indices = self.run.processes.joined(self.tally.total()), batch.indices
        if s is None:
            return  # another process has them
        check_scores(s, self.run.batches.dataset, indices)
        if self.chosen is not None:
            s = torch.where(_membership(self.chosen, indices), s, torch.nan)
        self.kept.take(batch.number, indices, s)

    def due(self) -> bool:
        """When the folder's pace says so."""
        return self.store.due

    def save(self, done: Collection[int]) -> None:
        """The matrix and its marks, or the heap."""
        if not self.run.processes.shard:
            self.kept.save(done, self.run.seconds[Stage.SCAN])

    def collect(self) -> None:
        """What all processes have scored, in the first."""
        self.kept.collect(self.run.seconds[Stage.SCAN])


def _membership(chosen: list[np.ndarray], indices: Sequence[int]) -> Tensor:
    """Which of a batch are a query's candidates: [Q,B]."""
    wanted = np.asarray(indices)
    found = np.zeros((len(chosen), len(wanted)), dtype=bool)
    for q, own in enumerate(chosen):
        if len(own):
            at = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
            found[q] = own[at] == wanted
    return torch.from_numpy(found)


def adding(gradients: dict[str, QueryGradients]) -> Callable[[Tensor, LayerBatch], None]:
    """Scores of a layer's batch against the queries."""

    def add(s: Tensor, seen: LayerBatch) -> None:
        add_scores(s, gradients[seen.layer.name], seen)

    return add


def on_device(run: Run, queries: Queries, own: slice = slice(None)) -> dict[str, QueryGradients]:
    """Every layer's queries (`own` of them) where and as the model computes, in the form that
    scores cheapest.

    They are multiplied out once and for all where all of those that should be fit in half of the
    free memory; else, where that still pays, for each batch.
    """
    batches = run.batches
    tokens = round(float(batches.lengths.mean()))

    Q = len(range(len(queries))[own])

    def pays(x: LayerQueries) -> bool:
        K, layer = 0 if x.R is None else x.R.shape[1], x.layer
        shape = Shape(
            B=batches.size, T=tokens, I=layer.I, O=layer.O, Q=Q, K=K, bias=layer.bias
        )  # fmt: skip
        return bool(K) and layer.kind != "embedding" and contraction(shape) == "dense"

    gains = {x.layer.name for x in queries.layers if pays(x)}
    size = sum(x.layer.O * x.layer.J for x in queries.layers if x.layer.name in gains)
    places = run.places([x.layer for x in queries.layers])
    fits = size * Q * run.dtype.itemsize < SHARE_OF_A_STAGE * free_bytes(run.device)

    def kept(x: LayerQueries) -> QueryGradients:
        moved = x.gradients.each(lambda part: part[own].to(places[x.layer.name], run.dtype))
        if fits and x.layer.name in gains:
            moved = Dense(moved.dense())
        return moved.laid_out()

    return {x.layer.name: kept(x) for x in queries.layers}
