"""A bank of retrainings: models trained on subsets of the data, and what each measures.

    run  ->  kept [N] bool, measurements [Q] fp64, the number of its subset, its seed, its seconds

A folder with a file a run (`run_000000.safetensors`) and a manifest; whoever made the models, the
numbers are read without the code that did. Scores of any method are held against them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import Whole, callback, check_json, is_number, path, require, shown, sized, whole
from ..data.batches import data_fingerprint
from ..data.examples import Indexable
from ..errors import ArgumentError, DataError, NotFiniteError, StoreError
from ..model.identity import described, task_state
from ..model.tasks import Task, checked_task
from ..store.fingerprint import fingerprint
from ..store.folder import Store
from ..store.manifest import MANIFEST
from .measure import measurements
from .workers import Train, outcomes

RUN = "run"
SCHEMA = {
    "data": str, "examples": Whole(1), "queries": str, "asked": Whole(1), "subsets": str,
    "count": Whole(1), "seeds": Whole(1),
}  # fmt: skip
Measure = Callable[[Any], Any]


def drawn(examples: int, count: int, share: float, seed: int = 0) -> np.ndarray:
    """`count` random subsets with `share` of the examples each, as masks [count,N].

    At least one example is kept, and at least one left out.
    """
    size = min(max(round(share * examples), 1), examples - 1)
    masks = np.zeros((count, examples), dtype=bool)
    for number, row in enumerate(masks):
        row[np.random.default_rng([seed, number]).choice(examples, size, replace=False)] = True
    return masks


def retrain(
    folder: str | Path,
    train: Train,
    dataset: Indexable,
    queries: Indexable,
    *,
    subsets: int | Sequence[Sequence[int]] = 64,
    seeds: int = 1,
    share: float = 0.5,
    seed: int = 0,
    measure: Measure | None = None,
    task: Task | None = None,
    about: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> "RetrainingBank":
    """Train a model on every subset and keep what it measures; continue a folder that was begun.

    Every run is durable when it ends: a kill repeats the runs that were under way, one a process.

    Args:
        folder: of the bank.
        train: (indices, seed) -> a model trained on `dataset[i]` of those indices. The same
            arguments should give the same model.
        dataset: the training data; with `queries`, what the bank is known by.
        queries: examples whose measurement is kept.
        subsets: how many random ones; or the indices of each.
        seeds: trainings of every subset, with seeds 0, 1, ...; two or more tell how much of an
            outcome is the seed's (`reliability`).
        share: of the data that a random subset keeps: 0.5, or 0.99 to leave out one per cent.
        seed: of the choice of subsets.
        measure: model -> [Q] numbers; None for the task's measurement of the queries.
        task: None for `LanguageModelTask`.
        about: JSON values that tell this training from another (steps, rate): a folder that was
            begun with others is refused.
        processes: trainings at a time, each in a process of its own, with as many threads as this
            one; `train` and `measure` are then functions of a module.
        progress: called with (runs done, all runs).

    Raises:
        StoreError: the folder was begun with other data, queries or settings; names each.
        NotFiniteError: a measurement is NaN or infinite; names the run and the query.
        DataError: `measure` does not return one number a query.
    """
    folder = path("folder", folder)
    require(callable(train), "train", train, "a function of (indices, seed)")
    callback("measure", measure)
    callback("progress", progress)
    seeds = whole("seeds", seeds)
    whole("seed", seed, 0)
    whole("processes", processes)
    N, Q = sized(dataset), sized(queries)
    if N < 2 or Q < 1:
        raise DataError(f"a bank of {N} training examples and {Q} queries has nothing to compare")
    if isinstance(subsets, int | np.integer):
        right = is_number(share) and 0 < share < 1
        require(right, "share", share, "a share of the data, between 0 and 1")
        masks = drawn(N, whole("subsets", subsets), share, seed)
    else:
        masks = _masks(subsets, N)
    facts = made_of(dataset, queries) | {
        "subsets": fingerprint(masks),
        "count": len(masks),
        "seeds": seeds,
        "about": dict(about or {}),
    }
    task = checked_task(task)
    own = None if task is None else (type(task).__qualname__, task_state(task))
    if measure or own:
        facts["measured"] = fingerprint(described(measure) if measure else own)
    measure = measure or partial(measurements, queries=queries, task=task)
    with Store.open(folder, kind="bank", facts=facts) as store:
        runs = store.pieces(RUN)
        # Seed by seed, so that a bank under way has as many subsets as it can.
        jobs = {
            number: (np.flatnonzero(masks[number % len(masks)]), number // len(masks))
            for number in range(len(masks) * seeds)
            if number not in runs.done
        }
        for number, values, seconds in outcomes(jobs, train, measure, processes):
            subset, again = number % len(masks), number // len(masks)
            where = f"run {number} (subset {subset}, seed {again})"
            tensors = {
                "kept": torch.from_numpy(masks[subset]),
                "measurements": _checked(values, Q, where),
                "subset": torch.tensor(subset),
                "seed": torch.tensor(again),
                "seconds": torch.tensor(seconds, dtype=torch.float64),
            }
            runs.write(number, tensors)
            if progress:
                progress(len(runs.done), len(masks) * seeds)
        if not store.finished:
            store.finish()
    return RetrainingBank(folder)


def made_of(dataset: Indexable, queries: Indexable) -> dict[str, Any]:
    """What a bank is known by: fingerprints and sizes."""
    return {
        "data": data_fingerprint(dataset),
        "examples": len(dataset),
        "queries": data_fingerprint(queries),
        "asked": len(queries),
    }


def _masks(subsets: Sequence[Sequence[int]], examples: int) -> np.ndarray:
    """Subsets by their indices, as masks [count,N]."""
    require(hasattr(subsets, "__len__") and len(subsets) > 0, "subsets", subsets, "at least one")
    masks = np.zeros((len(subsets), examples), dtype=bool)
    for number, indices in enumerate(subsets):
        chosen = np.asarray(indices)
        inside = chosen.ndim == 1 and len(chosen) and chosen.dtype.kind in "iu"
        if not inside or chosen.min() < 0 or chosen.max() >= examples:
            raise ArgumentError(
                f"subset {number} is {shown(indices)}, expected indices of {examples} examples"
            )
        masks[number, chosen] = True
    return masks


def _checked(values: Any, count: int, where: str) -> torch.Tensor:
    """Measurements [Q], fp64."""
    try:
        found = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: measure returned {shown(values)}, no numbers") from error
    if found.shape != (count,):
        raise DataError(
            f"{where}: measure returned {list(found.shape)}, expected one number for each of "
            f"{count} queries"
        )
    wrong = (~found.isfinite()).nonzero()
    if len(wrong):
        query = int(wrong[0])
        raise NotFiniteError(
            f"{where}: the measurement of query {query} is {found[query].item()}: the training "
            "diverged, or the query is outside what the model can be asked. Look at `train`; the "
            "run is not kept"
        )
    return found


class RetrainingBank:
    """A bank on disk, finished or under way.

    R runs so far: `kept` [R,N] bool, `measurements` [R,Q], `subset` and `seed` [R].

    Raises:
        StoreError: no bank there, or a file is damaged; names it.
        NotFiniteError: a stored measurement is no number; names run and query.
    """

    def __init__(self, folder: str | Path):
        """Open a folder written by `retrain`."""
        self.folder = path("folder", folder)
        self.store = Store.load(self.folder, kind="bank")
        facts = self.store.facts
        check_json(facts, SCHEMA, self.folder / MANIFEST, "Check the path")
        self.examples, self.queries = facts["examples"], facts["asked"]
        pieces = self.store.pieces(RUN)
        parts = [self._run(number, pieces.read(number)) for number in sorted(pieces.done)]

        def column(name: str, empty: tuple[int, ...]) -> np.ndarray:
            found = [part[name].numpy() for part in parts]
            return np.stack(found) if found else np.empty((0, *empty))

        self.kept = column("kept", (self.examples,)).astype(bool)
        self.measurements = column("measurements", (self.queries,))
        self.subset = column("subset", ()).astype(int)
        self.seed = column("seed", ()).astype(int)
        self.seconds = float(column("seconds", ()).sum())

    def _run(self, number: int, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One run, checked."""
        shapes = {"kept": (self.examples,), "measurements": (self.queries,), "subset": (),
                  "seed": (), "seconds": ()}  # fmt: skip
        for name, shape in shapes.items():
            if name not in part or part[name].shape != shape:
                found = list(part[name].shape) if name in part else "missing"
                raise StoreError(
                    f"{self.folder}, run {number}: {name} is {found}, expected {list(shape)}. "
                    "Delete the file and retrain again"
                )
        _checked(part["measurements"], self.queries, f"{self.folder}, run {number}")
        return part

    def __len__(self) -> int:
        return len(self.subset)

    @property
    def identity(self) -> str:
        """Names the bank: by what it was made from."""
        return fingerprint(self.store.facts)

    @cached_property
    def by_subset(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks [S,N], and measurements [S,K,Q] of every subset with each of K seeds.

        K counts the seeds that all S subsets have been trained with; before there is one, S are
        the subsets of the seed that is farthest.
        """
        runs = [np.flatnonzero(self.seed == seed) for seed in np.unique(self.seed)]
        most = max(map(len, runs), default=0)
        runs = [some[np.argsort(self.subset[some])] for some in runs if len(some) == most]
        same = [some for some in runs if np.array_equal(self.subset[some], self.subset[runs[0]])]
        if not same:
            empty = np.empty((0, 1, self.queries))
            return np.empty((0, self.examples), dtype=bool), empty
        return self.kept[same[0]], np.stack([self.measurements[some] for some in same], axis=1)

    def check(self, data: str | None, queries: str | None, what: str) -> None:
        """`check_examples` of the bank's own."""
        check_examples(self.store.facts, self.folder, data, queries, what)


def check_examples(
    facts: Mapping[str, Any], folder: Path, data: str | None, queries: str | None, what: str
) -> None:
    """Refuse what was made of other examples than a bank, by fingerprints; None is not known.

    Raises:
        StoreError: names which of the two differ.
    """
    pairs = (("training data", "data", data), ("queries", "queries", queries))
    wrong = [
        f"its {name} have the fingerprint {now}, the bank's {facts[key]}"
        for name, key, now in pairs
        if now not in (None, facts[key])
    ]
    if wrong:
        raise StoreError(
            f"{what} and the bank in {folder} do not belong together: {'; '.join(wrong)}. Score "
            "the bank's own data and queries, or retrain on these"
        )
