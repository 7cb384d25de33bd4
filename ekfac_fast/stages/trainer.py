"""`capture` as a callback of Hugging Face's `Trainer`, and of trainers made of it (TRL's).

callback = CaptureCallback(queries=queries)
Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
for step in callback.steps:
    print(step.number, [seen.scores for seen in step.batches])
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..checks import callback
from ..errors import ArgumentError
from ..extras import optional
from .loop import BatchScores, Captured, EmpiricalCovariance, capture
from .queries import Queries

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = optional("transformers", "hf").TrainerCallback


@dataclass(frozen=True)
class Step:
    """A step of the optimizer, counted from 1, and the batches that were accumulated for it."""

    number: int
    batches: list[BatchScores]


class CaptureCallback(TrainerCallback):
    """Captures while a `Trainer` trains; its gradients are bitwise those without.

    Scores of every step are in `steps`, or given to `on_step`; `covariances` are there after
    training. Loss and accumulation are understood where the trainer trains on the model's own loss;
    one with a loss of its own (label smoothing, `compute_loss_func`, DPO) is refused unless `scale`
    says by what it is divided. Of several processes each has its own batches.

    Args:
        layers, queries, covariances, scale: see `capture`.
        on_step: called with each `Step`, which is then not kept.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        queries: Queries | None = None,
        covariances: bool | None = None,
        scale: Tensor | float | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        callback("on_step", on_step)
        if on_step is not None and queries is None:
            raise ArgumentError("on_step is called with scores: give queries, too")
        self._how: dict[str, Any] = {
            "layers": layers, "queries": queries, "covariances": covariances, "scale": scale
        }  # fmt: skip
        self._on_step, self._held = on_step, ExitStack()
        self._captured: Captured | None = None
        self.steps: list[Step] = []
        self.covariances: dict[str, EmpiricalCovariance] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hooks go in.

        Raises:
            ArgumentError: the trainer compiles the model, or trains replicas in one process.
        """
        self.close()
        if args.torch_compile:
            raise ArgumentError("torch_compile: what a compiled model's layers read is not seen")
        if args.n_gpu > 1:
            raise ArgumentError(
                f"one process trains on {args.n_gpu} devices (DataParallel): start one a device "
                "(torchrun)"
            )
        self._captured = self._held.enter_context(capture(model, **self._how))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the optimizer is done."""
        if self._captured is None or self._how["queries"] is None:
            return
        step = Step(state.global_step, self._captured.take_scores())
        if self._on_step is None:
            self.steps.append(step)
        else:
            self._on_step(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hooks come out."""
        if self._captured is not None and self._captured.sums_covariances:
            self.covariances = self._captured.take_covariances()
        self.close()

    def close(self) -> None:
        """Take the hooks out: after a training that failed, which no trainer tells of."""
        self._captured = None
        self._held.close()
