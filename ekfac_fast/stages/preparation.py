"""Queries prepared: measured, preconditioned or refined, truncated; by all processes of a run."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import choice, comparable, instance, path, require, whole
from ..curvature.basis import Eigenvectors
from ..data.choices import OnLongExample, Reduce
from ..data.examples import IGNORED, Example, Indexable, tokenized_by
from ..errors import ArgumentError, DataError
from ..model.layers import Layer
from ..store.division import Division
from ..store.folder import Pieces, Store
from .damping import check_damping
from .factors import Factors, diagonal_facts, tell_of_zeros
from .measured import Gradients, Measuring, Preconditioning, Summing, represented
from .processes import Processes
from .queries import Queries, layer_from, refinement_from
from .refine import Refining
from .run import Run, RunArguments, Stage
from .sample import FACT
from .trial import reading_as

# Of a run under way: what the pass over the queries found, and what a refinement made of it.
PIECES = ("shard", "refined")


@torch.inference_mode(False)
def prepare_queries(
    model: nn.Module,
    factors: Factors,
    queries: Indexable,
    *,
    rank: int | None = 32,
    damping: float | str | None = None,
    refine: str | None = None,
    dataset: Indexable | None = None,
    refine_examples: int | None = None,
    refine_seed: int = 0,
    sets: Sequence[Any] | None = None,
    reduce: Reduce = "sum",
    out: str | Path | None = None,
    **arguments: Unpack[RunArguments],
) -> Queries:
    """Precondition the gradient of every query's measurement (Eq. 21), layer by layer.

    Args:
        model: the model that `factors` were fitted on.
        factors: from `fit`, or `Factors(folder)`.
        queries: examples whose `labels` are -100 on the prompt; what else a query may be the task
            says.
        rank: K of the factors that represent a query; None keeps full rank.
        damping: added to every eigenvalue: a number, the same in every layer; or, like "0.01x",
            that times each layer's mean eigenvalue; None: "0.1x".
        refine: "cg:10" goes on from there by so many conjugate gradient steps on the Gauss-Newton
            matrix of all tracked layers together, before a rank is taken; also "lissa:5000" and
            "astra:300". See `stages/refine.py`.
        dataset: the training data, of which a refinement takes a sample.
        refine_examples: how many examples of it (256, or all where there are fewer).
        refine_seed: of the choice.
        sets: a label a query: those of one label are one query together, in the order in which
            labels appear; None is no label: a query of its own. A column of the file, say:
            `questions.column("topic")`.
        reduce: the measurement of such a set is the "sum" or the "mean" of its queries'.
        out: a folder to keep what is prepared, and to continue in after a kill.
        arguments: see `RunArguments`.

    Raises:
        ArgumentError: the factors belong to another model, or a refinement cannot be (see
            `Refining`).
        DataError: a query is longer than the model has positions, or has nothing to measure.
        NotFiniteError: a measurement or a gradient is not finite.
    """
    rank = None if rank is None else whole("rank", rank)
    damping = check_damping(damping)
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out = None if out is None else path("out", out)
    whole("refine_seed", refine_seed, 0, 2**64 - 1)
    choice("reduce", reduce, get_args(Reduce))
    if refine is None and (dataset is not None or refine_examples is not None):
        raise ArgumentError(
            "dataset and refine_examples are a refinement's: give refine, or no such"
        )
    layers = factors.layers(model)
    choice("on_long", arguments.get("on_long", "refuse"), get_args(OnLongExample))
    with reading_as((factors.facts or {}).get("task"), arguments):
        run = Run(
            model, queries, {**arguments, "on_long": "refuse"}, processes=Processes.here(),
            asked=True,
        )  # fmt: skip
    facts = run.facts() | {
        "factors": factors.identity,
        "layers": [layer.name for layer in layers],
        "rank": rank,
        "damping": damping,
        **({"fitted": factors.facts["task"]} if factors.facts else {}),
        **({"blocks": factors.blocks} if factors.blocks > 1 else {}),
        **diagonal_facts(layers),
        **({"eigenvectors": factors.eigenvectors} if factors.eigenvectors else {}),
        **({FACT: factors.sample} if factors.sample else {}),
    }
    factors.check_run(facts, "prepare_queries")
    _check_targets(run)
    members = None if sets is None else members_of(sets, run.batches.size)
    if members is not None:
        facts["sets"] = {"reduce": reduce, "members": members}
    job = _Preparation(run, factors, layers, factors.dampings(layers, damping), rank)
    job.sets, job.mean = members, reduce == "mean"
    if refine is not None:
        job.refining = Refining(
            model, factors, layers, job.dampings, dataset, refine, refine_examples, refine_seed,
            arguments,
        )  # fmt: skip
        same = {"model": facts["model"], "tokenizer": tokenized_by(dataset)}
        factors.check_run(same, "prepare_queries, the data to refine on")
        facts["refine"] = job.refining.facts
    if out is None:
        with run.processes.together():
            return job.prepared(run.batches.divided(), facts, lambda _: _Held(), None)
    with run.opened(out, "queries", facts) as store:
        if not store.finished:
            batches = run.planned(store)
            prepared = job.prepared(batches, facts, store.pieces, store)
            if run.processes.first:
                prepared.save(out)
                store.finish(seconds=run.seconds)
        run.processes.meet()  # not before all have read the pieces
        if run.processes.first:
            for name in PIECES:
                store.pieces(name).remove()
    return Queries.load(out)


class _Held:
    """Pieces of a folder, where there is none."""

    def __init__(self) -> None:
        self.held: dict[int, dict[str, Tensor]] = {}
        self.done: set[int] = set()
        self.write, self.read = self.held.__setitem__, self.held.__getitem__


@dataclass
class _Preparation:
    """One run of `prepare_queries`."""

    run: Run
    factors: Factors
    layers: Sequence[Layer]
    dampings: dict[str, float]
    rank: int | None
    refining: Refining | None = None
    sets: list[list[int]] | None = None
    mean: bool = False

    @property
    def members(self) -> list[list[int]]:
        """What every query is of."""
        return self.sets or [[index] for index in range(self.run.batches.size)]

    def prepared(
        self,
        batches: Sequence[Sequence[int]],
        facts: dict[str, Any],
        pieces_of: Callable[[str], Pieces | _Held],
        store: Store | None,
    ) -> Queries:
        """The pass over the queries, and what is made of it."""
        found = pieces_of(PIECES[0])
        consumer: Measuring = Gradients(self.run, found.write)
        if self.refining is None:
            consumer = Preconditioning(
                self.run, self.factors, self.layers, self.dampings, self.rank, found.write
            )
        done = self.run.processes.from_first(found.done)
        if self.sets is None:
            self.run.each(
                Stage.QUERIES, self.layers, batches, consumer, done=done, loss=consumer.loss,
                what="measurement",
            )  # fmt: skip
        else:
            batches = [[number] for number in range(len(self.sets))]
            self._sum_sets(self.sets, consumer, found, done)
        self._exchange(found)
        parts = [found.read(number) for number in range(len(batches))]
        if self.refining is not None:
            every = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            order = Division.of(batches).indices.tolist()
            batches, parts = self._refined(self.refining, every, order, pieces_of(PIECES[1]), store)
        return self._put_together(batches, parts, facts)

    def _sum_sets(
        self,
        sets: Sequence[Sequence[int]],
        each: Measuring,
        found: "Pieces | _Held",
        done: Collection[int],
    ) -> None:
        """A piece for every set, one after the other: dense sums of one exist at a time."""
        run = self.run
        for number, members in enumerate(sets):
            if number in done:
                continue
            run.part = (number, len(sets))
            consumer = Summing(each, self.layers)
            batches = run.batches.divided(members)
            run.each(
                Stage.QUERIES, self.layers, batches, consumer, loss=consumer.loss,
                what="measurement",
            )  # fmt: skip
            piece = consumer.collected(len(members) if self.mean else 1)
            if run.processes.first:
                found.write(number, piece)
        run.part = (0, 1)

    def _refined(
        self,
        refining: Refining,
        every: dict[str, Tensor],
        order: Sequence[int],
        pieces: Pieces | _Held,
        store: Store | None,
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """Groups of queries, and what became of each."""
        some = refining.at_once
        groups = [list(order[at : at + some]) for at in range(0, len(order), some)]
        done = self.run.processes.from_first(pieces.done)
        left = [number for number in range(len(groups)) if number not in done]
        for number in self.run.processes.mine(left):
            mine, name = slice(number * some, (number + 1) * some), f"refinement_{number}_state"
            b = {x.name: every[x.name][mine] for x in self.layers}
            solved, told = refining.solve(b, groups[number], store, name)
            part = {f"refined {n}": x for n, x in told.items()}
            for layer, x in solved.items():
                for form, y in represented(x, Eigenvectors(None, None), self.rank).items():
                    part[f"{layer} {form}"] = y.cpu()
            pieces.write(number, part | {"measurements": every["measurements"][mine]})
            if store is not None:
                store.remove_state(name)
        self._exchange(pieces)
        self.run.seconds |= refining.run.seconds
        return groups, [pieces.read(number) for number in range(len(groups))]

    def _exchange(self, pieces: Pieces | _Held) -> None:
        """From here on every process can read the pieces of all."""
        if isinstance(pieces, Pieces):
            self.run.processes.meet()
            return
        for theirs in self.run.processes.gathered(pieces.held):
            pieces.held |= theirs

    def _put_together(
        self,
        batches: Sequence[Sequence[int]],
        parts: Sequence[dict[str, Tensor]],
        facts: dict[str, Any],
    ) -> Queries:
        """The queries of all batches, in their own order."""
        run, order = self.run, torch.from_numpy(Division.of(batches).places)
        every = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
        examples: tuple[tuple[Tensor, Tensor], ...] = ()
        if run.batches.language:
            # Where tokens have no labels, none is asked about.
            silent = run.batches.form.labels is None

            def labels(x: Example) -> Tensor:
                return torch.full_like(x.labels, IGNORED) if silent else x.labels

            loaded = [run.batches.example(index) for index in range(run.batches.size)]
            examples = tuple(
                (torch.cat([x.input_ids for x in some]), torch.cat([labels(x) for x in some]))
                for some in ([loaded[i] for i in own] for own in self.members)
            )
        found = tuple(layer_from(x, every, f"{x.name} ") for x in self.layers)
        form = "P" if self.rank is None else "L"
        # That no query is routed to an expert is no fault of anyone's.
        dense = [x for x in self.layers if x.expert is None]
        tell_of_zeros(((x.name, every[f"{x.name} {form}"]) for x in dense), "every query")
        damping = tuple(self.dampings[x.name] for x in self.layers)
        refinement = refinement_from(facts, every, "refined ")
        return Queries(
            found, self.rank, damping, every["measurements"], examples, facts, refinement
        )


def members_of(sets: Sequence[Any], queries: int) -> list[list[int]]:
    """The queries of every set, sets in the order in which they begin.

    Raises:
        ArgumentError: not one label a query, or a label that cannot be compared.
    """
    listed = isinstance(sets, Sequence) and not isinstance(sets, str | bytes)
    require(listed or isinstance(sets, np.ndarray), "sets", sets, "a list, one label a query")
    if len(sets) != queries:
        raise ArgumentError(f"sets has {len(sets)} labels, but there are {queries} queries")
    found: dict[Any, list[int]] = {}
    for index, label in enumerate(sets):
        key = ("alone", index) if label is None else ("set", comparable("sets", label))
        found.setdefault(key, []).append(index)
    return list(found.values())


def _check_targets(run: Run) -> None:
    """Refuse queries that measure nothing."""
    if not run.batches.language or not run.batches.without_targets:
        return
    for index in range(run.batches.size):
        if not run.batches.example(index).targets:
            raise DataError(
                f"query {index}: no token of it is measured (labels are -100 throughout, or only "
                "at the first token, which nothing predicts)"
            )
