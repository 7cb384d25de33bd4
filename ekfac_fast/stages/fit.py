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
from ..curvature.basis import Eigenvectors, SharedRotation
from ..curvature.eigen import FP32_FROM, Job, eigendecompositions, largest_first
from ..curvature.offload import placed
from ..curvature.sums import Sum
from ..data.examples import Indexable
from ..errors import ArgumentError, ModelError, Notice
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer, parameter_counts, select_layers
from ..model.rows import Rows
from ..model.tasks import LanguageModelTask, Task, checked_task
from ..store.files import load_tensors, save_json, save_tensors
from ..store.folder import Store
from .factors import (
    EIGENVALUES,
    EIGENVECTORS,
    LAMBDA,
    LAMBDA_COUNT,
    TOKEN_COUNT,
    Factors,
    kronfluence_arguments,
    tell_of_zeros,
)
from .parts import rotated
from .run import Batch, Kept, Run, RunArguments, Stage, accumulator
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
    max_examples: int | None = None,
    seed: int | None = None,
    **arguments: Unpack[RunArguments],
) -> Factors:
    """Fit the EK-FAC factors of `model` on `dataset` into the folder `out`; continue if it was
    begun.

    Args:
        model: any module with `nn.Linear` (or Hugging Face `Conv1D`) layers.
        dataset: indexable examples; see `Batches`.
        out: the factor folder; kronfluence reads it as `factors_<name>`.
        layers: names, globs, "mlp", "all"; None for the task's list, else "mlp".
        shared_parameters: modules with the very same parameters are one layer, whose gradients add
            up; refused otherwise.
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
    run = Run(model, dataset, arguments, max_examples=max_examples)
    facts = run.facts() | {
        "layers": [layer.name for layer in tracked],
        "shared_parameters": shared_parameters,
    }
    with Store.open(out, kind="factors", facts=facts) as store:
        if not store.finished:
            _Fit(run, tracked, store).run()
        for name in (Stage.COVARIANCE, Stage.EIGENVALUE):
            store.remove_state(f"{name}_state")
        store.pieces("eigen").remove()
    return Factors(out)


class Covariances(Sums):
    """Sums of a a^T and g g^T over tokens, and how many tokens each holds.

    Layers that read the same tensor (with a bias alike) share the sum of `a`. As in kronfluence,
    padding is left out of the inputs; gradients are zero there, and counted like inputs.
    """

    def __init__(self, run: Run, store: Store, layers: list[Layer], waiting: Waiting) -> None:
        super().__init__(run, store, Stage.COVARIANCE)
        self.layers, self.waiting = layers, waiting
        self.owners: dict[str, str] = dict(store.state.get("shared", {}))
        self.attention: Tensor | Mapping[str, Tensor] | None = None
        self.masks: list[tuple[Tensor, Rows, Tensor, Tensor]] = []
        kept, sides = self.state.tensors, ("activation", "gradient")
        self.cov: dict[str, dict[str, Sum]] = {
            s: {n: self.found(f"{s} covariance {n}") for n in _part(kept, f"{s} covariance ")}
            for s in sides
        }
        self.count = {
            s: {n: x.to(run.device) for n, x in _part(kept, f"{s} count ").items()} for s in sides
        }

    def begin(self, batch: Batch) -> None:
        """What the task says of padding, once a batch."""
        self.attention = self.run.task.get_attention_mask(batch=batch.inputs)
        self.masks.clear()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """cov += x^T diag(mask) x on both sides; a second draw waits."""
        if seen.loss:
            self.waiting.keep(seen, batch)
            return
        layer, (mask, real) = seen.layer, self._mask(seen)
        # Which layers share an input is the same in every batch.
        if layer.name not in self.owners:
            self.owners[layer.name] = seen.shared
            if len(self.owners) == len(self.layers):
                self.store.update(shared=self.owners)
        if self.owners[layer.name] == layer.name:
            there = mask if mask is None or seen.filled is None else mask[seen.filled]
            self._add("activation", layer.name, seen.tokens(seen.a), there, layer.bias, real)
        self._add("gradient", layer.name, seen.tokens(seen.g), None, False, real)

    def _add(
        self, side: str, name: str, x: Tensor, mask: Tensor | None, bias: bool, real: Tensor | int
    ) -> None:
        cov, count = self.cov[side], self.count[side]
        if name not in cov:
            J = x.shape[1] + bias
            cov[name] = self.found(f"{side} covariance {name}", J, J)
            count[name] = torch.zeros((), dtype=torch.int64, device=x.device)
        torch.ops.ekfac_fast.covariance(cov[name].rest, x, mask, bias)
        count[name] += real

    def _mask(self, seen: LayerBatch) -> tuple[Tensor | None, Tensor | int]:
        """Real positions of a layer's rows, flat, or None where every row is real; and how many.

        Layers with the same mask and the same rows share them.
        """
        mask = self.attention
        if isinstance(mask, Mapping):
            mask = mask.get(seen.layer.name)
        routed = seen.rows.places is not None
        if mask is None and routed:
            mask = seen.a.new_ones(seen.rows.sequences, seen.rows.positions, dtype=torch.bool)
        if mask is None or (seen.rows.positions == 1 and mask.shape[-1] != 1 and not routed):
            return None, seen.a.shape[0] * seen.a.shape[1]
        for own, rows, real, count in self.masks:
            if own is mask and rows.same(seen.rows):
                return real, count
        found = seen.rows.real(mask)
        if found is None:
            raise ModelError(
                f"layer {seen.layer.name} sees {seen.rows.positions} positions of "
                f"{seen.rows.sequences} sequences but the attention mask is {list(mask.shape)}: "
                "which of them are padding cannot be told. Leave it out of `layers`; or give "
                "batch_tokens=1, so that there is no padding; or a task whose get_attention_mask "
                "returns a mapping from layer names to masks"
            )
        self.masks.append((mask, seen.rows, found, found.sum()))
        return self.masks[-1][2:]

    def sums(self) -> Mapping[str, Sum]:
        """Covariances of both sides."""
        return {f"{s} covariance {n}": x for s, part in self.cov.items() for n, x in part.items()}

    def counts(self) -> Mapping[str, Tensor]:
        """Tokens in them."""
        return {f"{s} count {n}": x for s, part in self.count.items() for n, x in part.items()}


class Eigenvalues(Sums):
    """Sums of squared gradients over sequences, in the eigenbasis."""

    def __init__(
        self, run: Run, store: Store, layers: list[Layer], bases: Mapping[str, Eigenvectors]
    ) -> None:
        super().__init__(run, store, Stage.EIGENVALUE)
        self.lam = {x.name: self.found(x.name, x.O, x.J) for x in layers}
        self.bases = {x.name: placed(bases[x.name], (x.O, x.J), run.device) for x in layers}
        self.rotate = SharedRotation()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """lam += sum_b (Qg^T G_b Qa)^2."""
        name = seen.layer.name
        if name not in self.lam:
            return  # of the first pass, which did not yet know that no token comes here
        whole = self.bases[name].at(seen.g.device)
        for _, basis, g, a, bias in rotated(seen, whole, self.rotate):
            basis.add_eigenvalues(self.lam[name].rest, g, a, bias)

    def sums(self) -> Mapping[str, Sum]:
        """lam of every layer."""
        return self.lam


class _Fit:
    """One run of `fit`."""

    def __init__(self, run: Run, layers: list[Layer], store: Store) -> None:
        self.passes, self.layers, self.store = run, layers, store
        self.folder, self.waiting = store.folder, Waiting(run, layers)

    def run(self) -> None:
        batches = self.store.batches(self.passes.batches.divided)
        edges = self.store.state.get("edge_draws", {})
        if not (self.folder / EIGENVALUES["gradient"]).exists():
            edges = {Stage.COVARIANCE: self._covariances(batches)}
            self.store.update(seconds=self.passes.seconds, edge_draws=edges)
        self.layers = self._reached()
        if not (self.folder / EIGENVALUES["gradient"]).exists():
            self._eigendecompositions()
            self.store.update(seconds=self.passes.seconds)
        self.passes.seconds.update(self.store.state["seconds"])
        consumer = Eigenvalues(self.passes, self.store, self.layers, self._bases())
        self._pass(Stage.EIGENVALUE, batches, consumer, kept=self.waiting)
        save_tensors(self.folder / LAMBDA, {n: x.value().cpu() for n, x in consumer.lam.items()})
        count = torch.tensor([self.passes.batches.size])
        save_tensors(self.folder / LAMBDA_COUNT, {x.name: count.clone() for x in self.layers})
        # kronfluence reads it as its own dataclass: no further key.
        save_json(self.folder / "factor_arguments.json", self._arguments(), checksum=False)
        self.store.finish(
            sequences=self.passes.batches.size,
            parameters=parameter_counts(self.passes.model, self.layers),
            truncated=self.passes.batches.truncated,
            without_targets=self.passes.batches.without_targets,
            # The first pass has made the second's draws too, whether they could wait or not.
            edge_draws=sum(edges.values())
            + (0 if draws_several(self.passes.task) else consumer.edge_draws),
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
            done=consumer.state.done,
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
        sums, counts = consumer.cov["gradient"], consumer.count["gradient"]
        reached = [x.name for x in self.layers if x.expert is None or counts[x.name].any()]
        tell_of_zeros(((name, sums[name].value()) for name in reached), "the sampled loss")
        for side in consumer.cov:
            owner = {
                name: consumer.owners[name] if side == "activation" else name for name in reached
            }
            # safetensors stores no aliases: a shared covariance is written under every layer's
            # name.
            save_tensors(
                self.folder / f"{side}_covariance.safetensors",
                {name: consumer.cov[side][o].value().cpu() for name, o in owner.items()},
            )
            save_tensors(
                self.folder / f"num_{side}_covariance_processed.safetensors",
                {name: consumer.count[side][o].cpu().reshape(1) for name, o in owner.items()},
            )
        return consumer.edge_draws

    def _eigendecompositions(self) -> None:
        """Eigenvectors of every matrix, each kept as soon as it is found."""
        shared, done = self.store.state["shared"], self.store.pieces("eigen")
        keys: list[tuple[str, str]] = []
        jobs: list[Job] = []
        for side in EIGENVECTORS:
            sums = load_tensors(self.folder / f"{side}_covariance.safetensors", ours=True)
            counts = load_tensors(
                self.folder / f"num_{side}_covariance_processed.safetensors", ours=True
            )
            for name, matrix in sums.items():
                if side == "gradient" or shared[name] == name:
                    keys.append((side, name))
                    jobs.append(Job(matrix, counts[name], f"the {side} covariance of {name}"))
                    jobs[-1].check()
        order = [i for i in largest_first(jobs) if i not in done.done]
        total = sum(len(job.sum) ** 3 for job in jobs)
        dtype = accumulator(self.passes.model)
        precision = torch.float64 if dtype == torch.float64 else None
        solved = eigendecompositions([jobs[i] for i in order], self.passes.device, precision)
        count = sum(len(jobs[i].sum) ** 3 for i in done.done)
        with self.passes.timed(Stage.EIGENDECOMPOSITION):
            for i, (values, vectors) in zip(order, solved, strict=True):
                done.write(i, {"values": values.to(dtype), "vectors": vectors.to(dtype)})
                count += len(jobs[i].sum) ** 3
                self.passes.report(Stage.EIGENDECOMPOSITION, count, total)
        found = {key: done.read(i) for i, key in enumerate(keys)}
        for side in EIGENVECTORS:
            owner = {
                x.name: shared[x.name] if side == "activation" else x.name for x in self.layers
            }
            for files, part in ((EIGENVECTORS, "vectors"), (EIGENVALUES, "values")):
                save_tensors(
                    self.folder / files[side],
                    {name: found[side, o][part].clone() for name, o in owner.items()},
                )

    def _arguments(self) -> dict[str, Any]:
        """`factor_arguments.json`; the largest eigendecompositions say in which dtype they are."""
        largest = max(max(x.O, x.J) for x in self.layers)
        fp32 = accumulator(self.passes.model) == torch.float32 and largest >= FP32_FROM
        return kronfluence_arguments(torch.float32 if fp32 else torch.float64)

    def _bases(self) -> dict[str, Eigenvectors]:
        """Eigenvectors of every layer as its gradients are; one copy of what is shared."""
        Qa, Qg = (load_tensors(self.folder / name, ours=True) for name in EIGENVECTORS.values())
        owners, dtype = self.store.state["shared"], self.passes.dtype
        read = {owners[x.name] for x in self.layers}
        own = {o: Qa[o].to(self.passes.device, dtype) for o in read}
        return {
            x.name: Eigenvectors(Qg[x.name].to(dtype), own[owners[x.name]]) for x in self.layers
        }


def draws_several(task: Task) -> TypeGuard[LanguageModelTask]:
    """Whether the sampled loss is `LanguageModelTask`'s, and not a class's own."""
    own = LanguageModelTask.compute_train_loss
    return isinstance(task, LanguageModelTask) and type(task).compute_train_loss is own


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name has a prefix, without it."""
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
