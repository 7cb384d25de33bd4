"""What a model is asked: the training loss, the measurement of a query, and which layers count.

A task has the four methods of kronfluence's `Task`, called by keyword, so one written for it works
here unchanged:

    compute_train_loss(batch, model, sample=False)  sum of the training loss over the batch's
                                                    examples and tokens; sample=True draws labels
                                                    from the model
    compute_measurement(batch, model)               sum of the measurement over the batch's queries
    get_influence_tracked_modules()                 layer names, or None for the default
    get_attention_mask(batch)                       [B,T] of real positions, or None

A refinement of queries needs the training loss in two pieces, of any task but `LanguageModelTask`:

    compute_outputs(batch, model)                   what the loss is a function of, e.g. logits
    compute_output_loss(outputs, batch)             that function, the sum of compute_train_loss

Sign: score = + grad(measurement)^T (G + damping)^-1 grad(train loss). `LanguageModelTask` measures
the completion's negative log-likelihood, so positive means that the sequence raises its
log-probability.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import shown
from ..data.examples import IGNORED
from ..data.forms import Form
from ..errors import ArgumentError, DataError, ModelError
from ..ops.shapes import wide
from .head import (
    Hessian,
    Places,
    inspect_head,
    predicting,
    softmax_hessian,
    states,
    token_hessian,
    token_losses,
)
from .sampling import inverted, uniforms
from .text_tasks import UNTOLD, TextTask, changed_by_padding, roundings
from .weights import computes_in

# Tokens on which a model is tried out before a run.
PROBED = 16
# Rows of logits sampled at a time, where logits are whole: 64 x 50k in fp32 is 13 MB.
ROWS = 64


class Task(Protocol):
    """The methods that `fit`, `prepare_queries` and `score` call; see the module."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Sum of the loss over the batch; labels drawn from the model if `sample`."""
        ...

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """Sum of the measurement over the batch."""
        ...

    def get_influence_tracked_modules(self) -> list[str] | None:
        """Names of the layers whose parameters count."""
        ...

    def get_attention_mask(self, batch: Any) -> Tensor | dict[str, Tensor] | None:
        """Real positions."""
        ...


def checked_task(task: Any) -> Any:
    """`task`, or None; ArgumentError where it lacks a method, or cannot be called by keyword."""
    if task is None:
        return None
    if isinstance(task, type):
        raise ArgumentError(f"task is the class {task.__name__}, not a task: {task.__name__}()")
    for name, declared in vars(Task).items():
        if name.startswith("_"):
            continue
        if not callable(own := getattr(task, name, None)):
            raise ArgumentError(f"task is {shown(task)}, which has no method {name}")
        wanted = dict.fromkeys(list(inspect.signature(declared).parameters)[1:])
        try:
            inspect.signature(own, follow_wrapped=False).bind(**wanted)
        except TypeError as error:
            raise ArgumentError(
                f"{type(task).__name__}.{name} is called by keyword, as {name}({', '.join(wanted)})"
                f": {error}"
            ) from error
        except ValueError:
            pass  # of a callable that does not tell
    return task


def of_package(method: Any) -> bool:
    """Whether a task's method is this package's, and no user's."""
    module = getattr(method, "__module__", None) or ""
    return module.partition(".")[0] == __name__.partition(".")[0]


def summed(value: Any, task: Task, method: str) -> Tensor:
    """What a task returns for a batch, one number: []; ArgumentError where it is not."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            f"{type(task).__name__}.{method} returned {what}, expected one number, the sum over "
            "the batch: .sum()"
        )
    return value.reshape(())


class LanguageModelTask(TextTask):
    """Next-token prediction with a Hugging Face causal language model.

    Batches hold `input_ids`, `attention_mask`, `labels` [B,T] (unshifted, -100 ignored), `index`
    [B], the examples' ids, and whatever else the examples have for the model. The training loss is
    the cross-entropy summed over positions with a label (Eq. 22); the measurement is the same sum
    over the completion's tokens, -log p(completion | prompt) (Eq. 24). Of a query that is two
    sequences it is that of the first less that of the second: log p(B) - log p(A).

    Sampled labels (true Fisher, Eq. 11) depend on `seed`, the batch's `draw` (each pass over the
    data has its own), example id and unpadded position alone: Philox, keyed by (seed, id) and
    counted from `draw`, gives one uniform number a position, inverted through the model's
    cumulative distribution in fp64. Batch size, order and padding change nothing but rounding;
    `edge_draws` counts the labels that such rounding could flip.
    """

    def query_form(self, model: nn.Module) -> Form:
        """A sequence, or a completion against another."""
        return replace(self.form(model), sides=(1, 2))

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Cross-entropy summed over the batch: scalar, nats."""
        if sample:
            return self.sampled_losses(batch, model, [int(batch.get("draw", 0))])[0]
        return self._losses(batch, model).sum()

    def sampled_losses(self, batch: Any, model: nn.Module, draws: Sequence[int]) -> Tensor:
        """The training loss with several draws of labels, in one pass: [len(draws)], nats."""
        ids, mask = batch["index"], batch["attention_mask"]
        uniform = uniforms(self.seed, ids, mask, draws)
        return self._losses(batch, model, uniform).sum((1, 2))

    def measurements(self, batch: Any, model: nn.Module) -> Tensor:
        """-log p(completion | prompt) of every query, or that of A less that of B: [B], nats."""
        each = self.negative_log_likelihoods(batch, model)
        pairs = len(each) > len(batch["index"]) if "index" in batch else False
        return each[0::2] - each[1::2] if pairs else each

    def negative_log_likelihoods(self, batch: Any, model: nn.Module) -> Tensor:
        """-log p of every sequence's labelled tokens: [S], nats."""
        return self._losses(batch, model)[0].sum(1)

    def linear_outputs(self, batch: Any, model: nn.Module) -> tuple[Tensor, Hessian]:
        """What the training loss is a function of at every position that predicts, and its Hessian.

        Logits [n,V]; or what the head reads, [n,D], where logits are the head's output as it is.
        """
        inputs = self._inputs(batch, model)
        b, t = predicting(targets(batch))
        read = states(model, inputs)
        if read is None:
            z = _text(_all_logits(inputs, model), batch)[b, t]
            p = z.detach().softmax(-1, dtype=wide(z.dtype))
            return z, partial(softmax_hessian, p)
        head, h = read
        h = _text(h, batch)[b, t]
        return h, partial(token_hessian, h.detach(), head)

    def _losses(self, batch: Any, model: nn.Module, uniform: Tensor | None = None) -> Tensor:
        """Of every position that predicts: [1,B,T], or [N,B,T] with N draws of labels, nats."""
        labels, inputs = targets(batch), self._inputs(batch, model)
        places = predicting(labels)
        read = states(model, inputs)
        if read is None:
            logits = _text(_all_logits(inputs, model), batch)
            if uniform is None:
                return _cross_entropy(logits, labels).unsqueeze(0)
            drawn, edges = _drawn(logits.detach(), labels, places, uniform)
            losses = torch.stack([_cross_entropy(logits, y) for y in drawn])
        else:
            head, h = read
            losses, edges = token_losses(_text(h, batch), head, labels, places, uniform)
        self._edges = self._edges + edges
        return losses

    def logits(self, batch: Any, model: nn.Module) -> Tensor:
        """[B,T,V] of the text's own positions."""
        return _text(_all_logits(self._inputs(batch, model), model), batch)

    def _inputs(self, batch: Any, model: nn.Module) -> dict[str, Any]:
        """What the model is given of a batch."""
        mask, takes = batch["attention_mask"], inspect.signature(model.forward).parameters
        inputs = {name: x for name, x in batch.items() if name not in UNTOLD}
        if "position_ids" in inputs:
            # Documents packed into one sequence: models tell them apart by positions that start
            # again, but only where no mask is given. Padding on the right needs none.
            if not bool(mask[:, 0].all()):
                raise DataError("position_ids go with padding on the right only")
            del inputs["attention_mask"]
        elif "position_ids" in takes and not bool(mask[:, 0].all()):
            # Left padding: without this GPT-2 counts positions from the padding.
            inputs["position_ids"] = _positions(mask, model)
        if "use_cache" in takes:
            inputs["use_cache"] = False
        return inputs

    def check(self, batch: Any, model: nn.Module, padded: int = 0, packed: bool = False) -> int:
        """Refuse a model whose prediction depends on what it predicts, or on padding.

        Returns how many positions the model adds before the text.

        Raises:
            ModelError: another last token changes the logits before it, or (`padded`) padding does,
                or (`packed`) another document before it in the same sequence.
        """
        mask = batch["attention_mask"]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ModelError(
                "LanguageModelTask takes causal language models; this one has an encoder and a "
                "decoder: write a Task for it"
            )
        last = min(int(mask[0].nonzero()[-1]), PROBED - 1)
        one = {k: x[:1, : last + 1] if x.ndim == 2 else x[:1] for k, x in batch.items()}
        ids = one["input_ids"].clone()
        ids[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else (ids[0, -1] + 1) % 2
        with torch.no_grad():
            inputs = self._inputs(one, model)
            whole = _all_logits(inputs, model)
            inspect_head(model, inputs)
            logits = whole[0, whole.shape[1] - last - 1 :].float()
            behind = after = logits
            if last:
                after = self.logits(one | {"input_ids": ids}, model)[0].float()
            if padded:
                more = (0, max(1, padded - last - 1))
                longer = {
                    name: F.pad(x, more, value=IGNORED * (name == "labels")) if x.ndim == 2 else x
                    for name, x in one.items()
                }
                behind = self._first_logits(longer, model, last + 1).to(logits)
        eps, size = torch.finfo(computes_in(model)).eps, logits.abs().max()
        tolerance = min(1000 * eps, 0.02)
        # Another length is another rounding, and in few bits perhaps another expert.
        if (behind - logits).abs().max() > roundings(model, logits):
            raise changed_by_padding()
        if last and (after - logits)[:last].abs().max() > tolerance * size:
            raise ModelError(
                "the model sees the token that it predicts: it is bidirectional, not causal. "
                "LanguageModelTask takes causal language models (BERT and its kin: with "
                "is_decoder=True); write a Task for others"
            )
        if packed:
            self._check_packed(one, model, tolerance)
        return whole.shape[1] - last - 1

    def _first_logits(self, batch: Any, model: nn.Module, count: int) -> Tensor:
        """[count,V] of the first positions of one sequence; others are made only where logits have
        to be whole.
        """
        inputs = self._inputs(batch, model)
        if (read := states(model, inputs)) is None:
            return _text(_all_logits(inputs, model), batch)[0, :count]
        head, h = read
        found: Tensor = head(_text(h, batch)[:, :count].to(head.weight.device))
        return found[0]

    def _check_packed(self, one: dict[str, Any], model: nn.Module, tolerance: float) -> None:
        """Refuse a model that does not keep documents apart where positions start again."""
        ids, at = one["input_ids"], one["position_ids"]
        T = ids.shape[1]
        alone = one | {"position_ids": at[:, :1] + torch.arange(T, device=at.device)}
        # The same document twice, the first time in another order.
        both = {n: torch.cat([x, x], 1) if x.shape[1:] == (T,) else x for n, x in alone.items()}
        both["input_ids"] = torch.cat([(ids.flip(1) + 1) % (int(ids.max()) + 1), ids], 1)
        with torch.no_grad():
            expected = self.logits(alone, model)[0].float()
            found = self.logits(both, model)[0, -T:].float()
        if (found - expected).abs().max() > max(tolerance, 1e-4) * expected.abs().max():
            raise ModelError(
                "position_ids start again where another document begins, but this model does not "
                "keep the documents of a sequence apart (they are attended to, or a state runs "
                "on): give every document as an example of its own"
            )


def linear_outputs(task: Task, batch: Any, model: nn.Module) -> tuple[Tensor, Hessian]:
    """What a task's training loss is a function of, and the loss's Hessian in it.

    Raises:
        ArgumentError: the task does not tell.
    """
    outputs, loss = (getattr(task, x, None) for x in ("compute_outputs", "compute_output_loss"))
    if callable(outputs) and callable(loss):
        y: Tensor = outputs(batch=batch, model=model)
        return y, partial(_hessian, partial(loss, batch=batch), y.detach())
    if draws_several(task):
        return task.linear_outputs(batch, model)
    raise ArgumentError(
        f"refine: the Hessian of {type(task).__name__}'s loss in the model's outputs is not known. "
        "Give the task compute_outputs(batch, model) and compute_output_loss(outputs, batch), of "
        "which compute_train_loss is one after the other"
    )


def _hessian(loss: Callable[[Tensor], Tensor], y: Tensor, u: Tensor) -> Tensor:
    """The Hessian of a loss at y, times vectors u [Q,*y]."""
    y = y.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(y), y, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear
        return torch.zeros_like(u)
    return torch.stack([torch.autograd.grad(gradient, y, x, retain_graph=True)[0] for x in u])


def _text(x: Tensor, batch: Any) -> Tensor:
    """[B,T,...] without what a model adds before the text (prompt tuning)."""
    T = batch["attention_mask"].shape[1]
    return x[:, -T:] if x.shape[1] > T else x


def _all_logits(inputs: dict[str, Any], model: nn.Module) -> Tensor:
    """[B,T,V], or more positions where the model adds some before the text."""
    ids, logits = inputs["input_ids"], model(**inputs).logits
    if logits.ndim != 3 or len(logits) != len(ids) or logits.shape[1] < ids.shape[1]:
        raise ModelError(
            f"the model's logits are {list(logits.shape)} for tokens {list(ids.shape)}: "
            "LanguageModelTask takes causal language models; write a Task for others"
        )
    return logits


def _drawn(
    logits: Tensor, labels: Tensor, places: Places, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Labels [N,B,T] drawn from whole logits where `labels` has any, and how many are edges."""
    rows, columns = places
    drawn = labels.repeat(len(uniform), 1, 1)
    edges = torch.zeros((), dtype=torch.int64, device=logits.device)
    draws = uniform.to(logits.device)[:, rows, columns]
    for at in range(0, draws.shape[1], ROWS):
        b, t = rows[at : at + ROWS], columns[at : at + ROWS]
        p = logits[b, t].softmax(-1, dtype=wide(logits.dtype))
        drawn[:, b, t], near = inverted(p, draws[:, at : at + ROWS])
        edges += near
    return drawn, edges


def _positions(mask: Tensor, model: nn.Module) -> Tensor:
    """Positions [B,T] counted from the first real token, from where the model counts."""
    counted = mask.cumsum(-1)
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings"):
            padding = getattr(module, "padding_idx", None)
            if padding is not None:  # RoBERTa and its kin
                return (counted + padding) * mask + padding * (1 - mask)
    return (counted - 1).clamp(min=0)


def draws_several(task: Task) -> TypeGuard[LanguageModelTask]:
    """Whether the sampled loss is `LanguageModelTask`'s, and not a class's own."""
    own = LanguageModelTask.compute_train_loss
    return isinstance(task, LanguageModelTask) and type(task).compute_train_loss is own


def targets(batch: Any) -> Tensor:
    """What position t predicts: labels [B,T], -100 at the end and where position t is padding."""
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return labels.masked_fill(batch["attention_mask"] == 0, IGNORED)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of every label, 0 where ignored: [B,T], fp32 or wider."""
    z = logits.to(wide(logits.dtype))
    # Rows as they lie: a slice of the positions or a transposed view would copy all logits twice.
    losses = F.cross_entropy(
        z.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels)
