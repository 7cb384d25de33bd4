"""What all stages share: their settings, who they are, and the one loop over batches.

`Run.each` loads a batch, captures every tracked layer's (a, g), checks the loss, keeps progress,
reports it and takes the time. A stage is a `Consumer`: what to do with a layer's batch, with the
end of a batch, and how to keep what has been done. Nothing else knows the order of batches, so
processes slice it here, and partitions pass it some of the layers.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..checks import callback, instance, require, size
from ..curvature.memory import budget, free_bytes, give_back, is_limited, taken_bytes
from ..data.batches import Batches, default_tokens
from ..data.choices import OnLongExample
from ..data.examples import Indexable, tokenized_by
from ..errors import ArgumentError, NotFiniteError
from ..model.capture import Capture
from ..model.identity import model_fingerprint, task_state
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.products import of_libraries
from ..model.rows import Grid
from ..model.sampling import seeded
from ..model.spread import device_of
from ..model.tasks import LanguageModelTask, Task, checked_task, of_package, summed
from ..model.text_tasks import form_of
from ..model.weights import check_weights, computes_in, is_sharded
from ..ops.shapes import wide
from ..store.division import Division
from ..store.folder import Store
from .ahead import Ahead
from .budget import fitting_tokens
from .consumer import Batch, Consumer
from .inputs import Inputs
from .origin import origin
from .processes import ALONE, Processes
from .swapped import one_alone, swapped
from .trial import tried

Progress = Callable[[str, int, int], None]
Loss = Callable[["Batch"], Tensor]
Kept = MutableMapping[int, list[LayerBatch]]


class Stage(StrEnum):
    """The stages that report progress and whose time is kept."""

    REFERENCES = "references"
    COVARIANCE = "covariance"
    EIGENDECOMPOSITION = "eigendecomposition"
    EIGENVALUE = "eigenvalue"
    QUERIES = "queries"
    REFINEMENT = "refinement"
    SCAN = "scan"
    DETAIL = "detail"


class RunArguments(TypedDict, total=False):
    """Settings of a pass of a model over data, the same in every stage.

    task           None for `LanguageModelTask`
    batch_tokens   budget of a batch of a language model, with padding (default 4096, on a CPU 1024)
    batch_size     examples of a batch of any other model (default 16)
    on_long        what becomes of examples longer than the model has positions: "truncate" (the
                   end is cut off and counted) or "refuse"; queries are always refused
    autocast       dtype of the model's passes; sums stay fp32
    memory         bytes, or "16GiB", that this process may count on beside mapped files; None for
                   what is free. Smaller batches and layers fitted in parts keep to it
    progress       called with (stage, done, total), tokens where there are tokens
    """

    task: Task | None
    batch_tokens: int | None
    batch_size: int | None
    on_long: OnLongExample
    autocast: torch.dtype | None
    memory: int | str | None
    progress: Progress | None


class Run:
    """A model, a data set and settings: the passes of one stage.

    They are this process's alone, or those of all `processes` that share the stage: then each must
    come to it, and what `each` has done is a part.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Indexable,
        arguments: RunArguments,
        *,
        max_examples: int | None = None,
        processes: Processes = ALONE,
        asked: bool = False,
    ):
        if unknown := sorted(set(arguments) - RunArguments.__annotations__.keys()):
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
        self.model, self.processes = model, processes
        instance("model", model, nn.Module, "a torch module")
        self.task: Task = checked_task(arguments.get("task")) or LanguageModelTask()
        self.autocast, self.progress = arguments.get("autocast"), arguments.get("progress")
        lowered = any(self.autocast is x for x in (None, torch.bfloat16, torch.float16))
        require(lowered, "autocast", self.autocast, "torch.bfloat16, torch.float16 or None")
        callback("progress", self.progress)
        check_weights(model)
        memory, tokens = arguments.get("memory"), arguments.get("batch_tokens")
        self.memory = None if memory is None else size("memory", memory)
        if self.memory is not None and tokens is None:
            most = default_tokens(device_of(model))
            tokens = fitting_tokens(model, self.memory, most)
        self.batches = Batches(
            dataset,
            model,
            batch_tokens=tokens,
            batch_size=arguments.get("batch_size"),
            max_examples=max_examples,
            on_long=arguments.get("on_long", "truncate"),
            form=form_of(self.task, model, asked=asked),
            device=device_of(model),
        )
        self.device = self.batches.device
        if torch.is_autocast_enabled(self.device.type):
            raise ArgumentError(
                "called under torch.autocast, which would round sums and products of the stages, "
                "too: leave it, and give autocast= for the model's passes"
            )
        # Whether each pass is one of all processes together.
        self.sharded = is_sharded(model)
        # Of a layer's output, so of g: what bases and queries are kept in.
        self.dtype = self.autocast or computes_in(model)
        self.seconds: dict[str, float] = {}
        # Which of how many parts of the layers this is.
        self.part = (0, 1)
        self.inputs = Inputs(model, dataset)
        # Of the labels that a task of a user's draws.
        self.seed = 0
        # Positions that the model adds before the text.
        self.before = tried(self)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model as this run begins."""
        return model_fingerprint(self.model)

    def facts(self) -> dict[str, Any]:
        """What tells this run from another: its inputs."""
        return {
            "model": self.fingerprint,
            "data": self.batches.fingerprint(),
            "tokenizer": tokenized_by(self.batches.dataset),
            "examples": self.batches.size,
            "task": type(self.task).__qualname__,
            "task_state": task_state(self.task),
            "batch_tokens": self.batches.batch_tokens if self.batches.language else None,
            "batch_size": None if self.batches.language else self.batches.batch_size,
            "autocast": str(self.autocast),
        }

    @contextmanager
    def opened(self, out: str | Path, kind: str, facts: Mapping[str, Any]) -> Iterator[Store]:
        """A stage's folder, for every process of the run; all go on together when it is closed.

        Raises:
            ProcessError: another process fails meanwhile, or has other facts; names them.
        """
        processes = self.processes
        rank = {"process": processes.rank, "processes": processes.size}
        with processes.together(), budget(self.memory), self._own_share():
            processes.same(facts, f"{out}")
            with ExitStack() as held:
                with processes.led():
                    store = held.enter_context(Store.open(out, kind=kind, facts=facts, **rank))
                yield store
            processes.meet()

    @contextmanager
    def _own_share(self) -> Iterator[None]:
        """Of several processes on a machine: of its memory, and of a GPU that they share."""
        sharing = {torch.device("cpu"): self.processes.beside}
        if self.device.type == "cuda":
            sharing[self.device] = -(-self.processes.beside // torch.cuda.device_count())
        with ExitStack() as held:
            for place, many in sharing.items():
                if many > 1 and not is_limited(place):  # by `memory`, or by the stage around
                    own = taken_bytes(place) + free_bytes(place) // many
                    held.enter_context(budget(own, place.type))
            yield

    def planned(self, store: Store) -> Division:
        """The batches of a folder; the first process divides them."""
        with self.processes.led():
            return store.batches(self.batches.divided)

    def places(self, layers: Sequence[Layer]) -> dict[str, torch.device]:
        """Where each layer computes, and where its sums, basis and queries are kept."""
        return {x.name: device_of(self.model, x.module) for x in layers}

    def settings(self) -> AbstractContextManager:
        """The model's passes run under these: autocast, or nothing."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def train_loss(self, batch: Batch, draw: int | None = None) -> Tensor:
        """The training loss; labels sampled from the model with a `draw` of each pass's own.

        What a task of a user's draws with torch depends on `seed`, draw and examples alone.
        """
        inputs, drawing = batch.inputs, draw is not None
        if drawing and self.batches.language:
            inputs = inputs | {"draw": draw}
        ours = of_package(self.task.compute_train_loss)
        key = () if draw is None or ours else (self.seed, draw)
        with seeded(self.device, *key, *batch.indices) if key else nullcontext():
            loss = self.task.compute_train_loss(batch=inputs, model=self.model, sample=drawing)
        return summed(loss, self.task, "compute_train_loss")

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def report(self, stage: Stage, done: int, total: int) -> None:
        """Tell the caller how far a stage is, in the first process."""
        part, parts = self.part
        if self.progress and self.processes.first:
            self.progress(stage.value, done + part * total, parts * total)

    @torch.inference_mode(False)
    def each(
        self,
        stage: Stage,
        layers: Sequence[Layer],
        batches: Sequence[Sequence[int]],
        consumer: Consumer,
        *,
        done: Collection[int] = (),
        kept: Kept | None = None,
        loss: Loss | None = None,
        what: str = "training loss",
        capture: Capture | None = None,
    ) -> None:
        """Every batch that is not done yet and this process's, through the model and the consumer.

        Args:
            layers: those to capture; others cost nothing.
            batches: indices of the examples of each; an empty one only counts as done.
            done: numbers of batches that are, the same in all processes.
            kept: layers of batches that another pass has kept; they take no pass.
            loss: of a batch; None for the training loss with the data's own labels.
            capture: a pass that does more than to capture these layers.

        Raises:
            NotFiniteError: a loss is not, or what a consumer made of it; names where it is from.
            ModelError, DataError: weights or mapped data have changed meanwhile.
        """
        loss, done = loss or self.train_loss, set(done)
        capture = capture or Capture(
            self.model, layers, partial(swapped, self),
            believed=self.batches.language and of_libraries(self.model),
        )  # fmt: skip
        total = self.batches.tokens(Division.of(batches).indices)
        before = sum(self.batches.tokens(batches[number]) for number in done)
        count, finished, since = self.processes.counter(stage), set[int](), list[int]()
        mine = self.processes.mine([n for n in range(len(batches)) if n not in done])
        held = frozenset(kept or ())
        passing = [n for n in mine if n not in held and batches[n]]
        most = max(self.processes.gathered(len(passing))) if self.sharded else 0
        ahead = Ahead(self.batches, (batches[n] for n in passing))
        for place, number in enumerate(mine, 1):
            indices = batches[number]
            since.append(number)
            try:
                with self.timed(stage):
                    if kept and number in kept:
                        self._again(kept.pop(number), number, indices, consumer)
                    elif indices:
                        self._one(capture, number, indices, ahead, consumer, loss, what)
                finished.add(number)
                if consumer.due() or place == len(mine):
                    with self.timed(stage):
                        self.inputs.check()  # before what was computed of others counts
                        consumer.save(finished)
                    since.clear()
            except NotFiniteError as error:
                if self.sharded:  # every pass is one of all processes
                    raise
                again = (self._batch(n, batches[n]) for n in since if batches[n])
                raise NotFiniteError(f"{error}{origin(self, capture, loss, again)}") from error
            told = 0 if self.processes.shard else self.batches.tokens(indices)
            self.report(stage, before + count(told), total)
        # For its weights, a process keeps up with the one that has the most passes.
        for _ in range(len(passing), most):
            one = self._batch(0, next(filter(None, batches)))
            self.captured(capture, one, loss, lambda seen: None)
        give_back(self.device)

    def _one(
        self,
        capture: Capture,
        number: int,
        indices: Sequence[int],
        ahead: Ahead,
        consumer: Consumer,
        loss: Loss,
        what: str,
    ) -> None:
        """One batch."""
        batch = self._batch(number, indices, ahead.take())
        consumer.begin(batch)
        found = self.captured(capture, batch, loss, lambda seen: consumer.add(seen, batch))
        ahead.read()
        if not bool(torch.isfinite(found).all()):
            which = ", ".join(map(str, indices[:8])) + ("..." if len(indices) > 8 else "")
            first = found[~found.isfinite()][0].item()
            raise NotFiniteError(
                f"the {what} is {first} for examples {which}; look at them, or at the model's "
                "weights"
            )
        consumer.end(batch)

    def _batch(self, number: int, indices: Sequence[int], inputs: Any = None) -> Batch:
        inputs = self.batches.load(indices) if inputs is None else inputs
        return Batch(number, indices, inputs, self.grid(inputs, indices))

    def captured(
        self, capture: Capture, batch: Batch, loss: Loss, consume: Callable[[LayerBatch], None]
    ) -> Tensor:
        """A batch through the model: its loss, and every layer's (a, g) to `consume`."""

        def value() -> Tensor:
            with self.settings():
                return loss(batch)

        return capture(value, consume, batch.grid)

    def _again(
        self, layers: list[LayerBatch], number: int, indices: Sequence[int], consumer: Consumer
    ) -> None:
        """One batch whose layers have been kept."""
        batch = Batch(number, indices, None, Grid(len(indices)))
        consumer.begin(batch)
        while layers:
            consumer.add(layers.pop(0), batch)
        consumer.end(batch)

    def grid(self, inputs: Any, indices: Sequence[int]) -> Grid:
        """Sequences and positions of a batch."""
        if not self.batches.language:
            return Grid(len(indices), alone=partial(one_alone, self, indices))
        sides = self.batches.sides
        return Grid(len(indices) * sides, inputs["input_ids"].shape[1], self.before, sides)


def accumulator(model: nn.Module) -> torch.dtype:
    """The dtype of sums and scores of a model: fp32, or fp64 where it computes in that."""
    return wide(computes_in(model))
