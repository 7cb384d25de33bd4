"""Training sequences scored against queries: one pass over the data, whatever the number of
queries.

score_qb = sum over layers of <P_q, G_b>, with the preconditioned query gradient P_q in weight space
and the sequence's gradient G_b, which is never formed. Raw scores: no 1/N, positive = the sequence
raises the completion's log-probability (for `LanguageModelTask`).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batches, autocasting, model_fingerprint
from .candidates import top_candidates
from .data import Indexable
from .factors import Factors, Progress
from .hooks import Capture, LayerBatch, SharedRotation
from .ops.shapes import wide
from .plan import contraction
from .queries import LayerQueries, Queries
from .scores import DETAIL, Scores
from .store import Store, fingerprint
from .tasks import LanguageModelTask, Task

# Top and lowest sequences of each query whose token and layer detail is worked out; `top_k` says
# otherwise.
DETAILED, LOWEST = 20, 5
ops = torch.ops.ekfac_fast


def score(
    model: nn.Module,
    queries: Queries,
    dataset: Indexable,
    *,
    out: str | Path,
    task: Task | None = None,
    per_token: bool = False,
    per_layer: bool = False,
    top_k: int | None = None,
    candidates: str | Sequence[Sequence[int]] | None = None,
    train_size: int | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    on_long: Literal["truncate", "refuse"] = "truncate",
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every sequence of `dataset` against every query, into the folder `out`.

    A scan that was killed continues where it was, and ends in bitwise the same scores.

    Args:
        model: the model the queries were prepared on.
        queries: from `prepare_queries`.
        dataset: indexable examples; see `Batches`.
        out: folder of this scan.
        task: None for `LanguageModelTask`.
        per_token, per_layer: work out, in a second pass over them alone, the layer x token detail
            of each query's top and lowest sequences (`Scores.details`).
        top_k: keep a bounded heap per query in place of the [Q,N] matrix.
        candidates: "tfidf:10000" for the paper's filter (Eq. 28), or indices per query; sequences
            that are nobody's candidate are not scanned.
        on_long: what becomes of examples longer than the model has positions.
        train_size: N by which a display divides; None: the size of `dataset`.

    Raises:
        StoreError: `out` was begun with other settings; names each difference.
        ValueError: candidates do not fit, or a loss is not finite; names the examples.
    """
    task = task or LanguageModelTask()
    batches = Batches(
        dataset, model, batch_tokens=batch_tokens, batch_size=batch_size, on_long=on_long
    )
    ranked = _candidates(candidates, queries, batches)
    chosen = None if ranked is None else [np.unique(indices) for indices in ranked]
    facts = _facts(model, batches, task, autocast, train_size) | {
        "queries": fingerprint(len(queries), [q.dense()[:, :1] for q in queries.layers]),
        "layers": [q.layer.name for q in queries.layers],
        "rank": queries.rank,
        "damping": list(queries.damping),
        "top_k": top_k,
        "candidates": None if chosen is None else fingerprint([c.tolist() for c in chosen]),
        "detail": per_token or per_layer,
    }
    with Store.open(out, kind="scores", facts=facts) as store:
        if not store.finished:
            scan = _Scan(model, queries, batches, task, store, autocast, progress)
            scan.run(chosen, top_k)
            if per_token or per_layer:
                scan.detail(top_k, ranked if isinstance(candidates, str) else None)
            store.finish(truncated=batches.truncated)
    return Scores(out)


def self_scores(
    model: nn.Module,
    factors: Factors,
    dataset: Indexable,
    *,
    out: str | Path,
    task: Task | None = None,
    damping: float | None = None,
    train_size: int | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    on_long: Literal["truncate", "refuse"] = "truncate",
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Scores:
    """g^T (G + damping)^-1 g of every sequence's training gradient: a matrix of one row, into
    `out`.

    Arguments and errors as in `score`; `damping` as in `prepare_queries`.
    """
    task = task or LanguageModelTask()
    layers = factors.layers(model)
    batches = Batches(
        dataset, model, batch_tokens=batch_tokens, batch_size=batch_size, on_long=on_long
    )
    dampings = {layer.name: factors[layer.name].damping(damping) for layer in layers}
    facts = _facts(model, batches, task, autocast, train_size) | {
        "layers": [layer.name for layer in layers],
        "damping": list(dampings.values()),
        "top_k": None,
    }
    own = {layer.name: factors[layer.name] for layer in layers}
    rotate = SharedRotation()

    def add(s: Tensor, seen: LayerBatch) -> None:
        part, g = own[seen.layer.name], seen.g
        a, Qa, bias = rotate(seen, part.Qa.to(g))
        lam = part.lam.to(g.device, wide(g.dtype))
        ops.self_influence(s[0], g, a, part.Qg.to(g), Qa, lam, dampings[seen.layer.name], bias)

    with Store.open(out, kind="self", facts=facts) as store:
        if not store.finished:
            capture = Capture(model, layers)
            _scan(capture, 1, batches, task, store, autocast, progress, add, None, None)
            store.finish(truncated=batches.truncated)
    return Scores(out)


def _facts(model, batches: Batches, task: Task, autocast, train_size: int | None) -> dict[str, Any]:
    return {
        "model": model_fingerprint(model),
        "data": batches.fingerprint(),
        "examples": batches.size,
        "train_size": train_size or batches.size,
        "task": type(task).__qualname__,
        "batch_tokens": batches.batch_tokens if batches.language else None,
        "batch_size": None if batches.language else batches.batch_size,
        "autocast": str(autocast),
    }


def _candidates(
    wanted: str | Sequence[Sequence[int]] | None, queries: Queries, batches: Batches
) -> list[np.ndarray] | None:
    """Candidate indices of every query, TF-IDF's best first, or None for all."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        kind, _, count = wanted.partition(":")
        if kind != "tfidf" or not count.isdigit() or not int(count):
            raise ValueError(
                f"candidates is {wanted!r}, expected 'tfidf:COUNT' or indices per query"
            )
        tokens = [ids.tolist() for ids, _ in queries.examples]
        wanted = top_candidates(tokens, batches.dataset, int(count), batches.vocabulary)[0]
    if len(wanted) != len(queries):
        raise ValueError(f"candidates for {len(wanted)} queries, but there are {len(queries)}")
    found = [np.asarray(indices, dtype=np.int64) for indices in wanted]
    for q, indices in enumerate(found):
        if len(indices) and not 0 <= indices.min() <= indices.max() < batches.size:
            raise ValueError(f"query {q}: a candidate is outside the data set of {batches.size}")
    return found


def _scan(
    capture: Capture,
    Q: int,
    batches: Batches,
    task: Task,
    store: Store,
    autocast,
    progress,
    add,
    chosen: list[np.ndarray] | None,
    top_k: int | None,
) -> None:
    """One pass over the data: add(s [Q,B], LayerBatch) for every layer of every batch."""
    model, device = capture.model, batches.device
    plan = store.plan(batches.plan)
    scanned = None if chosen is None else np.unique(np.concatenate(chosen))
    dtype = wide(next(model.parameters()).dtype)
    matrix = None
    start, heap = store.load_state("heap") or (0, None)
    if top_k is None:
        matrix = store.matrix((Q, batches.size), "float64" if dtype == torch.float64 else "float32")
    elif heap is None:
        heap = {
            "values": torch.full((Q, top_k), -torch.inf, dtype=dtype),
            "indices": torch.full((Q, top_k), -1, dtype=torch.int64),
        }
    total = sum(map(batches.tokens, plan))
    done, seconds = 0, store.state.get("seconds", 0.0)
    for number, indices in enumerate(plan):
        done += batches.tokens(indices)
        if scanned is not None:
            indices = [i for i in indices if i in _Sorted(scanned)]
        if number < start or (matrix is not None and number in matrix.done) or not indices:
            continue
        begin = time.perf_counter()
        batch = batches.load(indices)
        s = torch.zeros(Q, len(indices), dtype=dtype, device=device)

        def loss(batch=batch) -> Tensor:
            with autocasting(device, autocast):
                return task.compute_train_loss(batch=batch, model=model)

        value = capture(loss, lambda seen, s=s: add(s, seen))
        if not torch.isfinite(value):
            raise ValueError(f"the training loss is {value.item()} for examples {indices[:8]}")
        s = s.cpu()
        if chosen is not None:
            own = torch.from_numpy(np.stack([np.isin(indices, c) for c in chosen]))
            s = torch.where(own, s, torch.nan)
        if matrix is not None:
            matrix.write(number, indices, s)
        else:
            _push(heap, s, indices)
            if store.due or number == len(plan) - 1:
                store.save_state(number + 1, heap, "heap")
        seconds += time.perf_counter() - begin
        if progress:
            progress("scan", done, total)
    if heap is not None:
        store.save_state(len(plan), heap, "heap")
    store.update(seconds=seconds)


class _Sorted:
    """Membership in a sorted array."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __contains__(self, value: int) -> bool:
        at = np.searchsorted(self.values, value)
        return bool(at < len(self.values) and self.values[at] == value)


def _push(heap: dict[str, Tensor], s: Tensor, indices: list[int]) -> None:
    """Merge the scores of a batch into the best of each query; ties go to the lower index."""
    values = torch.cat([heap["values"], s.nan_to_num(nan=-torch.inf)], 1).numpy()
    every = torch.tensor(indices).expand(len(s), -1)
    every = torch.where(s.isnan(), -1, every)
    ids = torch.cat([heap["indices"], every], 1).numpy()
    order = np.lexsort((ids, -values))[:, : heap["values"].shape[1]]
    heap["values"] = torch.from_numpy(np.take_along_axis(values, order, 1))
    heap["indices"] = torch.from_numpy(np.take_along_axis(ids, order, 1))


class _Scan:
    """One run of `score`."""

    def __init__(self, model, queries, batches, task, store, autocast, progress):
        self.queries, self.batches, self.task, self.store = queries, batches, task, store
        self.autocast, self.progress = autocast, progress
        self.capture = Capture(model, [q.layer for q in queries.layers])
        device, dtype = batches.device, autocast or next(model.parameters()).dtype
        tokens = sum(batches.lengths) / len(batches.lengths)
        self.factors = {
            q.layer.name: _on_device(q, len(queries), queries.rank, tokens, device, dtype)
            for q in queries.layers
        }

    def _add(self, s: Tensor, seen: LayerBatch) -> None:
        factors, bias = self.factors[seen.layer.name], seen.layer.bias
        factors = [x.to(seen.g) for x in factors]
        if len(factors) == 1:
            ops.dense_scores(s, *factors, seen.g, seen.a, bias)
        else:
            ops.low_rank_scores(s, *factors, seen.g, seen.a, bias)

    def run(self, chosen: list[np.ndarray] | None, top_k: int | None) -> None:
        _scan(
            self.capture,
            len(self.queries),
            self.batches,
            self.task,
            self.store,
            self.autocast,
            self.progress,
            self._add,
            chosen,
            top_k,
        )

    def detail(self, top_k: int | None, ranked: list[np.ndarray] | None) -> None:
        """Layer x token scores of each query's top and lowest sequences, one shard a query.

        A heap holds no lowest. `ranked`: candidates of each query, best first.
        """
        found = Scores(self.store.folder)
        names = [q.layer.name for q in self.queries.layers]
        for q in range(len(self.queries)):
            if q in self.store.done:
                continue
            places = {} if ranked is None else {int(i): n for n, i in enumerate(ranked[q], 1)}
            sides = {
                "top": found.top(q, top_k or DETAILED),
                "lowest": [] if top_k else found.top(q, LOWEST, lowest=True),
            }
            shard: dict[str, Tensor] = {}
            for side, pairs in sides.items():
                indices = [index for index, _ in pairs]
                columns = (
                    torch.tensor(indices, dtype=torch.int64),
                    torch.tensor([score for _, score in pairs], dtype=torch.float64),
                    torch.tensor([places.get(index, 0) for index in indices], dtype=torch.int64),
                )
                shard |= {f"{side}.{name}": x for name, x in zip(DETAIL, columns, strict=True)}
                for index in indices:
                    if f"{index}" not in shard:
                        shard[f"{index}"] = self._layer_tokens(q, index, names)
            self.store.write(q, shard)
            if self.progress:
                self.progress("detail", q + 1, len(self.queries))

    def _layer_tokens(self, q: int, index: int, names: list[str]) -> Tensor:
        """[L,T] of one sequence."""
        batch = self.batches.load([index])
        rows: dict[str, Tensor] = {}

        def consume(seen: LayerBatch) -> None:
            s = torch.zeros(1, *seen.g.shape[:2], dtype=wide(seen.g.dtype), device=seen.g.device)
            own = [x[q : q + 1].to(seen.g) for x in self.factors[seen.layer.name]]
            op = ops.dense_scores if len(own) == 1 else ops.low_rank_scores
            op(s, *own, seen.g, seen.a, seen.layer.bias)
            rows[seen.layer.name] = s[0, 0].cpu()

        def loss() -> Tensor:
            with autocasting(self.batches.device, self.autocast):
                return self.task.compute_train_loss(batch=batch, model=self.capture.model)

        self.capture(loss, consume)
        return torch.stack([rows[name] for name in names])


def _on_device(
    queries: LayerQueries, count: int, rank: int | None, tokens: float, device, dtype
) -> tuple[Tensor, ...]:
    """(P,) or (L, R) as the plan has it, where and as the model computes."""
    if queries.P is None and contraction(queries.layer, count, rank, tokens) == "low_rank":
        return queries.L.to(device, dtype), queries.R.to(device, dtype)
    return (queries.dense().to(device, dtype),)
