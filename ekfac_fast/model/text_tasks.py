"""What the tasks of this package have in common: tokens come in, padded, and every query's
measurement is known by itself.
"""

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..checks import choice, whole
from ..data.batches import pad_token
from ..data.choices import Measure
from ..data.forms import REFERENCES, Form
from ..errors import ModelError
from .sampling import uniforms
from .weights import computes_in

# What a batch holds that no model is given.
UNTOLD = ("labels", "label", "index", "draw", *REFERENCES)


class TextTask:
    """A task whose batches hold `input_ids`, `attention_mask`, `labels` [S,T] and `index` [B], the
    examples' ids; of examples that are several sequences S is a multiple of B.

    Raises:
        ArgumentError: the seed does not fit 64 bits.
    """

    def __init__(self, seed: int = 0):
        self.seed = whole("seed", seed, 0, 2**64 - 1)
        self._edges: Tensor | int = 0  # a number of the model's device: read only when asked for

    @property
    def edge_draws(self) -> int:
        """How many labels were drawn that rounding could flip."""
        return int(self._edges)

    def form(self, model: nn.Module) -> Form:
        """What is read of every example of the training data."""
        return Form()

    def query_form(self, model: nn.Module) -> Form:
        """What is read of every query."""
        return self.form(model)

    def check(self, batch: Any, model: nn.Module, padded: int = 0, packed: bool = False) -> int:
        """Refuse a model that the task does not fit, tried out on a batch of one example.

        padded: tokens that a sequence is padded to at most, 0 where none is; packed: whether some
        hold several documents.

        Returns how many positions the model adds before the text.

        Raises:
            ModelError: it does not.
        """
        return 0

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The training loss, summed over the batch; of labels drawn from the model if `sample`."""
        raise NotImplementedError

    def measurements(self, batch: Any, model: nn.Module) -> Tensor:
        """What every query measures: [B]."""
        raise NotImplementedError

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """`measurements`, summed over the batch."""
        return self.measurements(batch, model).sum()

    def get_influence_tracked_modules(self) -> list[str] | None:
        """The default: MLP matrices."""
        return None

    def get_attention_mask(self, batch: Any) -> Tensor:
        """Real positions [B,T], of several sequences all of them."""
        mask = batch["attention_mask"]
        return mask.view(len(batch["index"]), -1) if "index" in batch else mask


class OutputTask(TextTask):
    """A task whose training loss is a function of outputs, with labels that are drawn from them.

    measure  of a query: "loss", or "margin", minus the log-odds of its label: a positive score
             raises the label's probability either way
    """

    def __init__(self, measure: Measure = "loss", seed: int = 0):
        super().__init__(seed)
        choice("measure", measure, get_args(Measure))
        self.measure = measure

    def compute_outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """What the training loss is a function of."""
        raise NotImplementedError

    def compute_output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """That function: the training loss, summed."""
        return self.losses(outputs, batch).sum()

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss summed over the batch: scalar, nats (of a regression squared errors)."""
        z = self.compute_outputs(batch, model)
        return self.losses(z, self.drawn(z.detach(), batch) if sample else batch).sum()

    def measurements(self, batch: Any, model: nn.Module) -> Tensor:
        """The loss of every query's own label, or minus its margin: [B]."""
        z = self.compute_outputs(batch, model)
        return self.losses(z, batch) if self.measure == "loss" else -self.margins(z, batch)

    def losses(self, z: Tensor, batch: Any) -> Tensor:
        """Of every example: [B]."""
        raise NotImplementedError

    def margins(self, z: Tensor, batch: Any) -> Tensor:
        """Log-odds of every example's labels: [B]."""
        raise NotImplementedError

    def drawn(self, z: Tensor, batch: Any) -> dict[str, Any]:
        """The batch with labels drawn from the model."""
        raise NotImplementedError

    def uniform(self, batch: Any, count: int) -> Tensor:
        """`count` uniform numbers an example, fp64 [B,count]: of its id, seed and draw alone."""
        ids = batch["index"]
        every = torch.ones(len(ids), count, device=ids.device)
        (found,) = uniforms(self.seed, ids, every, [int(batch.get("draw", 0))], last=True)
        return found.to(ids.device)


def form_of(task: Any, model: nn.Module, *, asked: bool = False) -> Form:
    """What a task reads of every example, or (`asked`) of every query."""
    if not isinstance(task, TextTask):
        return Form()
    return task.query_form(model) if asked else task.form(model)


def padding_form(model: nn.Module, form: Form) -> Form:
    """A form that pads as the model expects: some look for the last token that is none."""
    token = pad_token(model)
    return form if token is None else replace(form, pad=token)


def changed_by_padding() -> ModelError:
    """What a task says of a model that computes something else beside padding."""
    return ModelError(
        "padding behind a sequence changes what the model computes of it: give batch_tokens=1, so "
        "that every sequence is alone in its batch"
    )


def roundings(model: nn.Module, x: Tensor) -> float:
    """How far two roundings of the same output may differ."""
    eps = torch.finfo(computes_in(model)).eps
    return (1e-4 if eps < 1e-6 else 0.1) * float(x.abs().max())
