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
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, Unpack

import torch
from torch import Tensor, nn

from ..checks import flag, instance, listed, path, whole
from ..curvature.basis import Eigenvectors
from ..curvature.blocks import dense
from ..curvature.eigen import FP32_FROM, Job, eigendecompositions, largest_first, united
from ..curvature.memory import free_bytes
from ..data.examples import Indexable
from ..errors import ArgumentError, Notice
from ..model.layers import Layer, parameter_counts, select_layers
from ..model.packed import tell_of_packed
from ..model.tasks import LanguageModelTask, Task, checked_task
from ..store.files import load_tensors, save_json, save_tensors
from ..store.folder import Store
from .budget import SUMS, partitions
from .consumer import Batch
from .factors import (
    EIGENVALUES,
    EIGENVECTORS,
    LAMBDA,
    LAMBDA_COUNT,
    TOKEN_COUNT,
    Factors,
    block_facts,
    blocks_of,
    diagonal_facts,
    kronfluence_arguments,
    tell_of_zeros,
    turning,
)
from .moments import Covariances, Eigenvalues
from .partitions import ARGUMENTS, part_folder, put_together
from .processes import Processes, dealt
from .run import Kept, Run, RunArguments, Stage, accumulator
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
    max_examples: int | None = None,
    seed: int | None = None,
    **arguments: Unpack[RunArguments],
) -> Factors:
    """Fit the EK-FAC factors of `model` on `dataset` into the folder `out`; continue if it was
    begun.

    Args:
        model: any module with `nn.Linear` (or Hugging Face `Conv1D`) layers, or others that are
            named (`docs/models.md`).
        dataset: indexable examples; see `Batches`.
        out: the factor folder; kronfluence reads it as `factors_<name>`.
        layers: names, globs, "mlp", "all"; None for the task's list, else "mlp".
        shared_parameters: modules with the very same parameters are one layer, whose gradients add
            up; refused otherwise.
        blocks: diagonal blocks that each covariance is cut into, what lies between them left out:
            2 take half of the memory and a quarter of the eigendecompositions' time.
        max_examples: use the first so many.
        seed: of the sampled labels; of the task, where one is given with a seed of its own.
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
    }
    with run.opened(out, "factors", facts) as store:
        if not store.finished:
            _fit(run, tracked, store)
        _tidy(run, store)
    return Factors(out)


def _fit(run: Run, layers: list[Layer], store: Store) -> None:
    """All layers at once where their sums fit into the memory, else in parts."""
    # A fit that is continued keeps to the parts that it was begun in.
    names: list[list[str]] | None = store.state.get("partitions")
    if names is None:
        room, itemsize = int(SUMS * free_bytes(run.device)), accumulator(run.model).itemsize
        parts = partitions(layers, room, itemsize, blocks_of(store.facts))
        names = [[x.name for x in some] for some in parts]
    names = run.processes.told(names)
    if len(names) == 1:
        _Fit(run, layers, store).run()
        return
    store.update(partitions=names)
    run.planned(store)
    named = {x.name: x for x in layers}
    for number, some in enumerate(names):
        run.part = (number, len(names))
        own = store.facts | {"layers": some}
        with run.opened(part_folder(store, number), "factors", own) as part:
            if not part.finished:
                _Fit(run, [named[name] for name in some], part).run()
            _tidy(run, part)
    run.part = (0, 1)
    if run.processes.first:
        put_together(store, len(names))


def _tidy(run: Run, store: Store) -> None:
    """What a fit kept of its way."""
    if run.processes.first:
        for name in (Stage.COVARIANCE, Stage.EIGENVALUE):
            store.remove_state(f"{name}_state")
        store.pieces("eigen").remove()


class _Fit:
    """One run of `fit`."""

    def __init__(self, run: Run, layers: list[Layer], store: Store) -> None:
        self.passes, self.layers, self.store = run, layers, store
        self.folder, self.processes = store.folder, run.processes
        self.waiting, self.blocks = Waiting(run, layers), blocks_of(store.facts)

    def run(self) -> None:
        batches = self.passes.planned(self.store)
        edges = self.store.state.get("edge_draws", {})
        decomposed = self.processes.told((self.folder / EIGENVALUES["gradient"]).exists())
        if not decomposed:
            edges = {Stage.COVARIANCE: self._covariances(batches)}
            self.store.update(seconds=self.passes.seconds, edge_draws=edges)
        self.layers = self._reached()
        if not decomposed:
            self._eigendecompositions()
            self.store.update(seconds=self.passes.seconds)
        self.passes.seconds.update(self.store.state["seconds"])
        consumer = Eigenvalues(self.passes, self.store, self.layers, self._bases())
        self._pass(Stage.EIGENVALUE, batches, consumer, kept=self.waiting)
        lam = consumer.collected()
        # The first pass has made the second's draws too, whether they could wait or not.
        drawn = 0 if draws_several(self.passes.task) else consumer.edge_draws
        if not self.processes.first:
            return
        save_tensors(self.folder / LAMBDA, {x.name: lam[x.name].cpu() for x in self.layers})
        count = torch.tensor([self.passes.batches.size])
        save_tensors(self.folder / LAMBDA_COUNT, {x.name: count.clone() for x in self.layers})
        # kronfluence reads it as its own dataclass: no further key.
        save_json(self.folder / ARGUMENTS, self._arguments(), checksum=False)
        self.store.finish(
            sequences=self.passes.batches.size,
            parameters=parameter_counts(self.passes.model, self.layers),
            truncated=self.passes.batches.truncated,
            without_targets=self.passes.batches.without_targets,
            edge_draws=sum(edges.values()) + drawn,
            seconds=self.passes.seconds,
        )

    def _reached(self) -> list[Layer]:
        """The layers that tokens came to; a `Notice` names experts that none was routed to."""
        counts = load_tensors(self.folder / TOKEN_COUNT, ours=True)
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
            stage,
            self.layers,
            batches,
            consumer,
            done=consumer.done,
            kept=kept,
            loss=partial(self._loss, stage),
        )

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

    def _covariances(self, batches: Sequence[Sequence[int]]) -> int:
        """The first pass and its files; how many of its labels rounding could flip."""
        consumer = Covariances(self.passes, self.store, self.layers, self.waiting)
        self._pass(Stage.COVARIANCE, batches, consumer)
        found, edges = consumer.collected(), consumer.edge_draws
        # A process without a batch has seen no layer; which share an input is the same in all.
        self.store.update(shared=max(self.processes.gathered(consumer.owners), key=len))
        if self.processes.first:
            self._write_covariances(found)
        self.processes.meet()
        return edges

    def _write_covariances(self, found: Mapping[str, Tensor]) -> None:
        shared = self.store.state["shared"]
        counts = {x.name: found[f"gradient count {x.name}"] for x in self.layers}
        reached = [x.name for x in self.layers if x.expert is None or counts[x.name].any()]
        sums = ((name, found[f"gradient covariance {name}"]) for name in reached)
        tell_of_zeros(sums, "the sampled loss")
        for side in EIGENVECTORS:
            owner = {name: shared[name] if side == "activation" else name for name in reached}
            # safetensors stores no aliases: a shared covariance is written under every layer's
            # name.
            save_tensors(
                self.folder / f"{side}_covariance.safetensors",
                {
                    n: dense(found[f"{side} covariance {o}"].cpu(), self.blocks)
                    for n, o in owner.items()
                },
            )
            save_tensors(
                self.folder / f"num_{side}_covariance_processed.safetensors",
                {name: found[f"{side} count {o}"].cpu().reshape(1) for name, o in owner.items()},
            )

    def _eigendecompositions(self) -> None:
        """Eigenvectors of every matrix, each kept as soon as it is found."""
        shared, done = self.store.state["shared"], self.store.pieces("eigen")
        done.done = self.processes.told(done.done)
        keys: list[tuple[str, str]] = []
        jobs: list[Job] = []
        diagonal: dict[tuple[str, str], Mapping[str, Tensor]] = {}
        for side in EIGENVECTORS:
            sums = load_tensors(self.folder / f"{side}_covariance.safetensors", ours=True)
            counts = load_tensors(
                self.folder / f"num_{side}_covariance_processed.safetensors", ours=True
            )
            for name, matrix in sums.items():
                if side == "gradient" or shared[name] == name:
                    job = Job(matrix, counts[name], f"the {side} covariance of {name}")
                    if matrix.ndim == 1:
                        job.check()
                        mean, ones = matrix / counts[name], torch.ones_like(matrix)
                        diagonal[side, name] = {"values": mean, "vectors": ones}
                        continue
                    keys.append((side, name))
                    jobs += job.in_blocks(self.blocks)
        order = [i for i in largest_first(jobs) if i not in done.done]
        total = sum(len(job.sum) ** 3 for job in jobs)
        before = sum(len(jobs[i].sum) ** 3 for i in done.done)
        costs = [len(jobs[i].sum) ** 3 for i in order]
        order = [order[at] for at in dealt(costs, self.processes.size)[self.processes.rank]]
        dtype = accumulator(self.passes.model)
        precision = torch.float64 if dtype == torch.float64 else None
        solved = eigendecompositions([jobs[i] for i in order], self.passes.device, precision)
        count = self.processes.counter("matrices")
        with self.passes.timed(Stage.EIGENDECOMPOSITION):
            for i, (values, vectors) in zip(order, solved, strict=True):
                done.write(i, {"values": values.to(dtype), "vectors": vectors.to(dtype)})
                after = before + count(len(jobs[i].sum) ** 3)
                self.passes.report(Stage.EIGENDECOMPOSITION, after, total)
        self.processes.meet()
        if self.processes.first:
            solutions = united(map(done.read, range(len(jobs))), self.blocks)
            self._write_eigenvectors(dict(zip(keys, solutions, strict=True)) | diagonal)
        self.processes.meet()

    def _write_eigenvectors(self, found: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> None:
        shared = self.store.state["shared"]
        for side in EIGENVECTORS:
            owner = {
                x.name: shared[x.name] if side == "activation" else x.name for x in self.layers
            }
            for files, part in ((EIGENVECTORS, "vectors"), (EIGENVALUES, "values")):
                save_tensors(
                    self.folder / files[side],
                    {name: found[side, o][part] for name, o in owner.items()},
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
        own = {o: turning(Qa[o], self.blocks, self.passes.device, dtype) for o in read}
        return {
            x.name: Eigenvectors(turning(Qg[x.name], self.blocks, dtype), own[owners[x.name]])
            for x in self.layers
        }


def draws_several(task: Task) -> TypeGuard[LanguageModelTask]:
    """Whether the sampled loss is `LanguageModelTask`'s, and not a class's own."""
    own = LanguageModelTask.compute_train_loss
    return isinstance(task, LanguageModelTask) and type(task).compute_train_loss is own
