"""Fit EK-FAC factors: covariances (Eq. 16), their eigenvectors, corrected eigenvalues (Eq. 20).

Two passes over the data with labels sampled from the model, each with draws of its own: eigenvalues
of the very gradients that the eigenvectors come from would be too large. The first pass sums
activation and gradient covariances per token; the second, in their eigenbasis, sums squared
gradients per sequence.

Of a language model one forward pass serves both: the second draw's (a, g) are kept in memory, as
far as they fit, until the eigenbasis is there. What did not fit, or was lost in a kill, is passed
again and comes out in the same bits.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..checks import flag, instance, listed, path, whole
from ..curvature.basis import Eigenvectors
from ..curvature.blocks import block_rows, dense
from ..curvature.eigen import FP32_FROM, Job, eigendecompositions, largest_first, united
from ..curvature.memory import free_bytes
from ..data.examples import Indexable
from ..errors import ArgumentError, Notice
from ..model.layers import Layer, parameter_counts, select_layers
from ..model.packed import tell_of_packed
from ..model.tasks import LanguageModelTask, checked_task, draws_several
from ..store.files import load_tensors, save_json, save_tensors
from ..store.folder import Store
from .budget import SUMS, partitions
from .consumer import Batch
from .disk import check_fit, check_stored, drop_covariances, results_of, settle_covariances
from .export import ARGUMENTS, kronfluence_arguments
from .factors import (
    COVARIANCES,
    DROPPED,
    EIGENVALUES,
    EIGENVECTORS,
    LAMBDA,
    LAMBDA_COUNT,
    SUMMED,
    TOKEN_COUNTS,
    Factors,
    block_facts,
    blocks_of,
    diagonal_facts,
    tell_of_zeros,
    turning,
)
from .moments import Covariances, Eigenvalues
from .partitions import part_folder, put_together
from .processes import Processes, dealt
from .run import Kept, Run, RunArguments, Stage, accumulator
from .sample import met, sample_facts, sample_of, sampled
from .sums import Sums
from .waiting import Waiting

# Which draw of an example's labels each pass takes.
COVARIANCE_DRAW, EIGENVALUE_DRAW = 1, 0


@torch.inference_mode(False)
def fit(
    model: nn.Module,
    dataset: Indexable,
    *,
    out: str | Path,
    layers: str | list[str] | None = None,
    shared_parameters: bool = False,
    blocks: int = 1,
    keep_covariances: bool | None = None,
    eigenvectors: torch.dtype | None = None,
    max_examples: int | None = None,
    eigenvalue_examples: int | None = None,
    seed: int | None = None,
    **arguments: Unpack[RunArguments],
) -> Factors:
    """Fit the EK-FAC factors of `model` on `dataset` into the folder `out`; continue if it was
    begun.

    Args:
        model: any module with `nn.Linear` (or Hugging Face `Conv1D`) layers, or others that are
            named (`docs/models.md`).
        dataset: indexable examples; see `Batches`.
        out: the factor folder; with its covariances kronfluence reads it as `factors_<name>`.
        layers: names, globs, "mlp", "all"; None for the task's list, else "mlp".
        shared_parameters: modules with the very same parameters are one layer, whose gradients add
            up; refused otherwise.
        blocks: diagonal blocks that each covariance is cut into, what lies between them left out:
            2 take half of the memory and a quarter of the eigendecompositions' time.
        keep_covariances: as kronfluence does; without them what several layers share is stored
            once, too, and `export_factors` writes kronfluence's folder. None: where they are less
            than 1 GiB. False drops those of a finished fit.
        eigenvectors: torch.bfloat16 stores them rounded, in half of the bytes, and corrects the
            eigenvalues in that basis; None: in the dtype of sums.
        max_examples: use the first so many.
        eigenvalue_examples: correct the eigenvalues on so many of them, evenly spaced, in a pass of
            their own: of less than half that is quicker than the draw that it saves. None: on all.
        seed: of the sampled labels (None: 0); of the task, where it has one of its own.
        arguments: see `RunArguments`.

    Raises:
        StoreError: `out` was begun with another model, data set or setting; names each difference.
        NotFiniteError: a loss or a sum is not finite; names the examples or the layer.
        Error: a layer, an example or an argument is wrong.
    """
    out = path("out", out)
    instance("model", model, nn.Module, "a torch module")
    flag("shared_parameters", shared_parameters)
    if seed is not None:
        whole("seed", seed, 0, 2**64 - 1)
    task = arguments["task"] = checked_task(arguments.get("task")) or LanguageModelTask(seed or 0)
    own = getattr(task, "seed", None)
    if seed is not None and own not in (None, seed):
        raise ArgumentError(f"seed is {seed}, but the task has a seed of its own, {own}")
    wanted = layers if layers is not None else task.get_influence_tracked_modules()
    tracked = select_layers(model, wanted, shared=shared_parameters)
    tell_of_packed(model, tracked)
    run = Run(model, dataset, arguments, max_examples=max_examples, processes=Processes.here())
    facts = run.facts() | {
        "layers": [layer.name for layer in tracked],
        "shared_parameters": shared_parameters,
        **block_facts(blocks, tracked),
        **diagonal_facts(tracked),
        **check_stored(eigenvectors),
        **sample_facts(eigenvalue_examples, run.batches.size),
        **({"seed": seed} if seed and own is None else {}),
    }
    run.seed = own if isinstance(own, int) else seed or 0
    with run.opened(out, "factors", facts) as store:
        settle_covariances(store, keep_covariances, tracked, accumulator(model).itemsize)
        check_fit(store)
        if not store.finished:
            _fit(run, tracked, store)
        _tidy(run, store)
        if run.processes.first and keep_covariances is False:
            drop_covariances(store)
    return Factors(out)


def _fit(run: Run, layers: list[Layer], store: Store) -> None:
    """All layers at once where their sums fit into the memory, else in parts."""
    # A fit that is continued keeps to the parts that it was begun in.
    names: list[list[str]] | None = store.state.get("partitions")
    if names is None:
        room, itemsize = int(SUMS * free_bytes(run.device)), accumulator(run.model).itemsize
        parts = partitions(layers, room, itemsize, blocks_of(store.facts))
        names = [[x.name for x in some] for some in parts]
    names = run.processes.from_first(names)
    store.update(partitions=names)
    if len(names) == 1:
        _Fit(run, layers, store).run()
        return
    run.planned(store)
    named = {x.name: x for x in layers}
    for number, some in enumerate(names):
        run.part = (number, len(names))
        own = store.facts | {"layers": some}
        with run.opened(part_folder(store, number), "factors", own) as part:
            part.update(keep_covariances=store.state["keep_covariances"])
            if not part.finished:
                _Fit(run, [named[name] for name in some], part).run()
            _tidy(run, part)
    run.part = (0, 1)
    if run.processes.first:
        put_together(store, len(names))


def _tidy(run: Run, store: Store, *stages: Stage) -> None:
    """What a fit kept of its way, up to its end or to that of these stages."""
    if run.processes.first:
        for name in stages or (Stage.COVARIANCE, Stage.EIGENVALUE):
            store.remove_state(f"{name}_state")
        store.pieces("eigen").remove()
        if store.state.get("covariances") == DROPPED:
            drop_covariances(store)


class _Fit:
    """One run of `fit`."""

    def __init__(self, run: Run, layers: list[Layer], store: Store) -> None:
        self.passes, self.layers, self.store = run, layers, store
        self.folder, self.processes = store.folder, run.processes
        self.sample, self.blocks = sample_of(store.facts), blocks_of(store.facts)
        self.waiting = Waiting(run, layers, wanted=self.sample is None)
        self.keeps: bool = store.state["keep_covariances"]

    def run(self) -> None:
        batches = self.passes.planned(self.store)
        decomposed = self.processes.from_first((self.folder / EIGENVALUES["gradient"]).exists())
        if not decomposed and "covariances" not in self.store.state:
            self._covariances(batches)
        edges = self.store.state.get("edge_draws", {})
        self.passes.seconds.update(self.store.state["seconds"])
        self.layers = self._reached()
        if not decomposed:
            self._eigendecompositions()
            self.store.update(seconds=self.passes.seconds)
        _tidy(self.passes, self.store, Stage.COVARIANCE)
        consumer = Eigenvalues(self.passes, self.store, self.layers, self._bases())
        some = batches if self.sample is None else sampled(self.passes.batches, self.sample)
        self._pass(Stage.EIGENVALUE, some, consumer, kept=self.waiting)
        lam = consumer.collected()
        # The first pass has made the second's draws too, whether they could wait or not.
        drawn = 0 if draws_several(self.passes.task) else consumer.edge_draws
        if not self.processes.first:
            return
        if self.sample is not None:
            self.layers = met(self.layers, lam, self.sample)
        save_tensors(self.folder / LAMBDA, {x.name: lam[x.name].cpu() for x in self.layers})
        count = torch.tensor([self.sample or self.passes.batches.size])
        save_tensors(self.folder / LAMBDA_COUNT, {x.name: count.clone() for x in self.layers})
        # kronfluence reads it as its own dataclass: no further key.
        save_json(self.folder / ARGUMENTS, self._arguments(), checksum=False)
        read = self.passes.batches
        self.store.finish(
            results_of(self.store), sequences=read.size, truncated=read.truncated,
            without_targets=read.without_targets, edge_draws=sum(edges.values()) + drawn,
            parameters=parameter_counts(self.passes.model, self.layers),
            seconds=self.passes.seconds,
        )  # fmt: skip

    def _reached(self) -> list[Layer]:
        """The layers that tokens came to; a `Notice` names experts that none was routed to."""
        counts = load_tensors(self.folder / TOKEN_COUNTS["activation"], ours=True)
        if idle := [x.name for x in self.layers if x.name not in counts]:
            warnings.warn(
                f"no token of the data was routed to {listed(idle, 3)}: without factors, these "
                f"{len(idle)} of {len(self.layers)} layers take no part in any score. More data "
                "may reach them",
                Notice,
                stacklevel=4,
            )
        return [x for x in self.layers if x.name in counts]

    def _pass(
        self,
        stage: Stage,
        batches: Sequence[Sequence[int]],
        consumer: Sums,
        kept: Kept | None = None,
    ) -> None:
        self.passes.each(
            stage, self.layers, batches, consumer, done=consumer.done, kept=kept,
            loss=partial(self._loss, stage),
        )  # fmt: skip

    def _loss(self, stage: Stage, batch: Batch) -> Tensor:
        """The loss with a stage's draw of labels; with the covariances' the next stage's as well,
        where that can wait.

        Both draws are made either way, so that either way gives the same bits.
        """
        task = self.passes.task
        if not draws_several(task):
            draw = COVARIANCE_DRAW if stage is Stage.COVARIANCE else EIGENVALUE_DRAW
            return self.passes.train_loss(batch, draw)
        draws = [COVARIANCE_DRAW, EIGENVALUE_DRAW]
        losses = task.sampled_losses(batch.inputs, self.passes.model, draws)
        if stage is Stage.EIGENVALUE:
            return losses[1]
        return losses if self.waiting.takes(batch) else losses[0]

    def _covariances(self, batches: Sequence[Sequence[int]]) -> None:
        """The first pass and its files."""
        consumer = Covariances(self.passes, self.store, self.layers, self.waiting)
        self._pass(Stage.COVARIANCE, batches, consumer)
        found, edges = consumer.collected(), consumer.edge_draws
        # A process without a batch has seen no layer; which share an input is the same in all.
        shared = max(self.processes.gathered(consumer.owners), key=len)
        if self.processes.first:
            self._write_covariances(found, shared)
        self.processes.meet()
        self.store.update(
            shared=shared, covariances=SUMMED, seconds=self.passes.seconds,
            edge_draws={Stage.COVARIANCE: edges},
        )  # fmt: skip
        if self.processes.first:
            self.store.remove_state(consumer.name)

    def _write_covariances(self, found: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
        counts = {x.name: found[f"gradient count {x.name}"] for x in self.layers}
        reached = [x.name for x in self.layers if x.expert is None or counts[x.name].any()]
        sums = ((name, found[f"gradient covariance {name}"]) for name in reached)
        tell_of_zeros(sums, "the sampled loss")
        for side in EIGENVECTORS:
            owner = {name: shared[name] if side == "activation" else name for name in reached}
            # safetensors stores no aliases: a shared covariance is kept under every layer's name.
            save_tensors(
                self.folder / COVARIANCES[side],
                {
                    n: dense(found[f"{side} covariance {o}"].cpu(), self.blocks)
                    for n, o in owner.items()
                    if self.keeps or n == o
                },
            )
            save_tensors(
                self.folder / TOKEN_COUNTS[side],
                {name: found[f"{side} count {o}"].cpu().reshape(1) for name, o in owner.items()},
            )

    def _matrices(self) -> tuple[dict[tuple[str, str], int], list[tuple[str, str]]]:
        """Rows of every covariance, by side and name, one of those that layers share; and the sides
        and names of those that are a diagonal.
        """
        shared, whole, diagonals = self.store.state["shared"], {}, []
        for at, side in enumerate(EIGENVECTORS):
            for x in sorted(self.layers, key=lambda x: x.name):
                if side == "gradient" or shared[x.name] == x.name:
                    if x.turned[at]:
                        whole[side, x.name] = x.turned[at]
                    else:
                        diagonals.append((side, x.name))
        return whole, diagonals

    def _eigendecompositions(self) -> None:
        """Eigenvectors of every matrix, each kept as soon as it is found."""
        done, (matrices, diagonals) = self.store.pieces("eigen"), self._matrices()
        done.done = self.processes.from_first(done.done)
        sizes = [len(range(n)[x]) for n in matrices.values() for x in block_rows(n, self.blocks)]
        jobs: list[Job] = []
        # Where all are done, covariances may have been dropped.
        if len(done.done) < len(sizes) + len(diagonals):
            every = self._jobs([*matrices, *diagonals])
            jobs = [x for job in every[: len(matrices)] for x in job.in_blocks(self.blocks)]
            if self.processes.first:
                for number, job in enumerate(every[len(matrices) :], len(sizes)):
                    done.write(number, job.of_diagonal())
        order = [i for i in largest_first(jobs) if i not in done.done]
        total = sum(size**3 for size in sizes)
        before = sum(sizes[i] ** 3 for i in done.done if i < len(sizes))
        costs = [sizes[i] ** 3 for i in order]
        order = [order[at] for at in dealt(costs, self.processes.size)[self.processes.rank]]
        dtype = accumulator(self.passes.model)
        precision = torch.float64 if dtype == torch.float64 else None
        mine = [jobs[i] for i in order]
        solved = eigendecompositions(mine, self.passes.device, precision, settle=True)
        count = self.processes.counter("matrices")
        stored = torch.bfloat16 if "eigenvectors" in self.store.facts else dtype
        with self.passes.timed(Stage.EIGENDECOMPOSITION):
            for i, (values, vectors) in zip(order, solved, strict=True):
                done.write(i, {"values": values.to(dtype), "vectors": vectors.to(stored)})
                after = before + count(sizes[i] ** 3)
                self.passes.report(Stage.EIGENDECOMPOSITION, after, total)
        self.processes.meet()
        if self.processes.first:
            if not self.keeps:
                drop_covariances(self.store)
            solutions = united(map(done.read, range(len(sizes))), self.blocks)
            found = dict(zip(matrices, solutions, strict=True))
            for number, key in enumerate(diagonals, len(sizes)):
                found[key] = done.read(number)
            self._write_eigenvectors(found)
        self.processes.meet()

    def _jobs(self, covariances: Iterable[tuple[str, str]]) -> list[Job]:
        """Of so many covariances, by side and name."""
        sums, counts = {}, {}
        for side, file in COVARIANCES.items():
            sums[side] = load_tensors(self.folder / file, ours=True)
            counts[side] = load_tensors(self.folder / TOKEN_COUNTS[side], ours=True)
        return [
            Job(sums[side][name], counts[side][name], f"the {side} covariance of {name}")
            for side, name in covariances
        ]

    def _write_eigenvectors(self, found: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> None:
        shared = self.store.state["shared"]
        for side in EIGENVECTORS:
            owner = {
                x.name: shared[x.name] if side == "activation" else x.name for x in self.layers
            }
            for files, part in ((EIGENVECTORS, "vectors"), (EIGENVALUES, "values")):
                save_tensors(
                    self.folder / files[side],
                    {n: found[side, o][part] for n, o in owner.items() if self.keeps or n == o},
                )

    def _arguments(self) -> dict[str, Any]:
        """`factor_arguments.json`; the largest eigendecompositions say in which dtype they are."""
        largest = max(-(-max(x.turned) // self.blocks) for x in self.layers)
        fp32 = accumulator(self.passes.model) == torch.float32 and largest >= FP32_FROM
        return kronfluence_arguments(torch.float32 if fp32 else torch.float64)

    def _bases(self) -> dict[str, Eigenvectors]:
        """Eigenvectors of every layer as its gradients are; one copy of what is shared."""
        Qa, Qg = (load_tensors(self.folder / name, ours=True) for name in EIGENVECTORS.values())
        owners, dtype = self.store.state["shared"], self.passes.dtype
        read = {owners[x.name] for x in self.layers}
        places = self.passes.places(self.layers)
        own = {o: turning(Qa[o], self.blocks, places[o], dtype) for o in read}
        return {
            x.name: Eigenvectors(turning(Qg[x.name], self.blocks, dtype), own[owners[x.name]])
            for x in self.layers
        }
