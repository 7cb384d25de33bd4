"""Sequences and tokens that are classified or rated, by Hugging Face's models for that.

    single label   z [K]   -log softmax(z)_y                    y ~ softmax(z)
    multi-label    z [K]   -sum_k log sigmoid(+-z_k)            y_k ~ Bernoulli(sigmoid(z_k))
    regression     z [K]   sum_k (z_k - y_k)^2                  y_k ~ N(z_k, 1/2)
    tokens         z [T,K] -sum over labels log softmax(z_t)_y  y_t ~ softmax(z_t)

On the right are the labels that the Fisher is of. Losses are sums over labels, which each of these
distributions is the exponential of: with the variance 1/2, so is the squared error. (transformers
takes means over K: a factor that scales scores of several labels and changes no order.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import choice
from ..data.choices import Measure
from ..data.examples import IGNORED
from ..data.forms import Class, Classes, Form, Numbers, Reads
from ..errors import ArgumentError, ModelError
from ..ops.shapes import wide
from .sampling import EDGE, inverted, uniforms
from .text_tasks import (
    UNTOLD,
    OutputTask,
    changed_by_padding,
    padding_form,
    roundings,
)

SINGLE, MULTI, REGRESSION = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip
# Of the Gaussian that labels of a regression are drawn from.
SPREAD = 0.5**0.5


class Classified(OutputTask):
    """What tasks of models with `num_labels` outputs have in common."""

    def logits(self, batch: Any, model: nn.Module) -> Tensor:
        """[S,K], or [S,T,K] of tokens, fp32 or wider.

        Raises:
            ModelError: the model does not run on such a batch, or returns no such logits.
        """
        ids = batch["input_ids"]
        inputs = {name: x for name, x in batch.items() if name not in UNTOLD}
        try:
            z = model(**inputs).logits
        except ValueError as error:
            if len(ids) == 1:
                raise
            raise ModelError(
                f"{type(model).__name__} does not run on several sequences at once ({error}): set "
                "config.pad_token_id, or give batch_tokens=1"
            ) from error
        shape = (*self._places(ids), outputs_of(model))
        if tuple(z.shape) != shape:
            raise ModelError(
                f"the model's logits are {list(z.shape)} for tokens {list(ids.shape)}, expected "
                f"{list(shape)}: {type(self).__name__} does not fit a {type(model).__name__}"
            )
        return z.to(wide(z.dtype))

    def _places(self, ids: Tensor) -> tuple[int, ...]:
        """What has logits."""
        return (len(ids),)

    def check(self, batch: Any, model: nn.Module, padded: int = 0, packed: bool = False) -> int:
        """Refuse a model that padding changes.

        Raises:
            ModelError: it does, or has no logits such as the task expects.
        """
        T, pad = batch["input_ids"].shape[1], self.form(model).pad
        more = (0, max(1, padded - T))
        tokens = {n: x[:1] for n, x in batch.items() if x.ndim == 2 and x.shape[1] == T}
        longer = {
            name: F.pad(torch.cat([x, x]), more, value=pad * (name == "input_ids"))
            for name, x in tokens.items()
        }
        with torch.no_grad():
            (alone,) = self.logits(tokens, model)
            if not padded:
                return 0
            behind, _ = self.logits(longer, model)
        if alone.ndim > 1:
            behind = behind[:T]
        if not bool((behind - alone).abs().max() <= roundings(model, alone)):
            raise changed_by_padding()
        return 0

    def compute_outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """What the training loss is a function of: the logits."""
        return self.logits(batch, model)


class SequenceClassificationTask(Classified):
    """Classification or regression of whole sequences: `AutoModelForSequenceClassification`.

    Examples have `label` (or `labels`) beside `input_ids`: a class, 0 or 1 of every class, or
    numbers, as `config.problem_type` says; where it says nothing, one output is a regression's and
    several are classes. A regression has no margin.

    Args:
        measure: "loss" or "margin", of queries.
        seed: of drawn labels.
        problem_type: in place of the configuration's.
    """

    def __init__(self, measure: Measure = "loss", seed: int = 0, problem_type: str | None = None):
        super().__init__(measure, seed)
        if problem_type is not None:
            choice("problem_type", problem_type, (SINGLE, MULTI, REGRESSION))
        self.problem_type = problem_type
        self._problem = problem_type

    def form(self, model: nn.Module) -> Form:
        """A label of every example."""
        K, problem = outputs_of(model), problem_of(model, self.problem_type)
        if problem == REGRESSION and self.measure == "margin":
            raise ArgumentError('measure is "margin", which a regression has none of; take "loss"')
        self._problem = problem
        kinds: dict[str, Reads] = {SINGLE: Class(K), MULTI: Classes(K), REGRESSION: Numbers(K)}
        return padding_form(model, Form(None, values={"label": kinds[problem]}))

    @property
    def regression(self) -> bool:
        """Whether labels are numbers, of the model that was seen last."""
        return self._problem == REGRESSION

    def compute_outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """The logits, or what a regression predicts: [B,K]."""
        self._problem = problem_of(model, self.problem_type)
        return self.logits(batch, model)

    def losses(self, z: Tensor, batch: Any) -> Tensor:
        """Cross-entropy, or squared error: [B]."""
        y = batch["label"]
        if self._problem == SINGLE:
            return F.cross_entropy(z, y, reduction="none")
        y = y.to(z.dtype)
        if self._problem == MULTI:
            return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
        return (z - y).square().sum(1)

    def margins(self, z: Tensor, batch: Any) -> Tensor:
        """log p / (1 - p) of the label; of several labels, their sum."""
        if self._problem == SINGLE:
            return log_odds(z, batch["label"])
        return ((2 * batch["label"].to(z.dtype) - 1) * z).sum(1)

    def drawn(self, z: Tensor, batch: Any) -> dict[str, Any]:
        """Labels of the model's own distribution."""
        if self._problem == SINGLE:
            u = self.uniform(batch, 1).mT
            (y,), edges = inverted(z.softmax(-1), u)
            self._edges = self._edges + edges
            return batch | {"label": y}
        u = self.uniform(batch, z.shape[1])
        if self._problem == MULTI:
            p = z.double().sigmoid()
            self._edges = self._edges + ((u - p).abs() < EDGE).any(1).sum()
            return batch | {"label": (u < p).double()}
        return batch | {"label": z.double() + SPREAD * torch.special.ndtri(u.clamp(min=1e-300))}


class TokenClassificationTask(Classified):
    """Classification of tokens: `AutoModelForTokenClassification`.

    Examples have `labels`, one a token and its own (not the next one's); -100 where there is none:
    special tokens, and all but the first of a word.
    """

    def form(self, model: nn.Module) -> Form:
        """A label of every token."""
        return padding_form(model, Form("own", classes=outputs_of(model)))

    def _places(self, ids: Tensor) -> tuple[int, ...]:
        return tuple(ids.shape)

    def losses(self, z: Tensor, batch: Any) -> Tensor:
        """Cross-entropy summed over an example's labels: [B]."""
        y = batch["labels"]
        each = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none")
        return each.view_as(y).sum(1)

    def margins(self, z: Tensor, batch: Any) -> Tensor:
        """log p / (1 - p), summed over an example's labels: [B]."""
        y = batch["labels"]
        there = y != IGNORED
        each = log_odds(z.flatten(0, 1), y.clamp(min=0).flatten()).view_as(y)
        return each.masked_fill(~there, 0).sum(1)

    def drawn(self, z: Tensor, batch: Any) -> dict[str, Any]:
        """Where there is a label, another, of the model's own distribution."""
        y, ids, mask = batch["labels"], batch["index"], batch["attention_mask"]
        u = uniforms(self.seed, ids, mask, [int(batch.get("draw", 0))], last=True)[0]
        b, t = (y != IGNORED).nonzero(as_tuple=True)
        (found,), edges = inverted(z[b, t].softmax(-1), u.to(z.device)[b, t].unsqueeze(0))
        self._edges = self._edges + edges
        return batch | {"labels": y.index_put((b, t), found)}


def log_odds(z: Tensor, y: Tensor) -> Tensor:
    """log p_y / (1 - p_y), p = softmax(z): z [n,K], y [n] -> [n]."""
    own = y.unsqueeze(1)
    others = z.scatter(1, own, -torch.inf).logsumexp(1)
    return z.gather(1, own).squeeze(1) - others


def outputs_of(model: nn.Module) -> int:
    """K of a model: config.num_labels.

    Raises:
        ArgumentError: its configuration does not say.
    """
    K = getattr(getattr(model, "config", None), "num_labels", None)
    if not isinstance(K, int):
        raise ArgumentError(
            f"model is a {type(model).__name__} without config.num_labels: give one of "
            "transformers' models for classification, or a task of your own"
        )
    return K


def problem_of(model: nn.Module, given: str | None = None) -> str:
    """The kind of labels: as given, as config.problem_type says, or by their number.

    Raises:
        ArgumentError: no such kind, or one class alone.
    """
    K = outputs_of(model)
    kind = given or getattr(model.config, "problem_type", None)
    kind = kind or (REGRESSION if K == 1 else SINGLE)
    choice("config.problem_type", kind, (SINGLE, MULTI, REGRESSION))
    if kind == SINGLE and K == 1:
        raise ArgumentError(
            f"{SINGLE}, but the model has one output: of one class there is nothing to learn"
        )
    return str(kind)
