"""Scores and covariances out of a training loop, from the very passes that train.

with capture(model, queries=queries) as captured:
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for seen in captured.take_scores():
            print(seen.scores)
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..checks import flag, instance, is_number, require
from ..curvature.query_gradients import QueryGradients
from ..curvature.sums import Sum
from ..errors import ArgumentError, ModelError, NotFiniteError, Notice
from ..model.identity import model_fingerprint
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer, linear_layers, select_layers
from ..model.packed import tell_of_packed
from ..model.watch import Pass, Watch
from ..model.weights import refuse_compiled
from ..ops.shapes import wide
from ..store.fingerprint import fingerprint
from .parts import Tally, add_scores
from .queries import Queries
from .sums import BATCHES_A_FOLD


@dataclass(frozen=True)
class BatchScores:
    """Scores of one forward pass of the loop: [Q,B], a column for each sequence of its batch.

    `tokens` [B,T] and `mask` [B,T] are what the model was given (None where it was given none).
    """

    scores: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    @cached_property
    def sequences(self) -> list[str]:
        """16 hex digits for each sequence's tokens without padding: `fingerprint(ids)` of it."""
        if self.tokens is None:
            return []
        ids, mask = self.tokens.cpu(), self.mask
        real = torch.ones_like(ids) if mask is None else mask.cpu()
        return [fingerprint(x[m.bool()].long()) for x, m in zip(ids, real, strict=True)]


@dataclass(frozen=True)
class EmpiricalCovariance:
    """Sums of a a^T [J,J] and g g^T [O,O] over tokens of one layer, and how many tokens each holds.

    g is the gradient of the summed loss of the loop's own labels: the *empirical* Fisher's factor,
    over weights that moved meanwhile. `fit` draws labels from a model that stands still (the true
    Fisher); these sums are none of its factors, and nothing takes them for such.
    """

    activation: Tensor
    gradient: Tensor
    activation_tokens: int
    gradient_tokens: int


class Captured:
    """What has been captured since the last `take_...`; made by `capture`.

    `scale` may be set anew before every backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        queries: Queries | None,
        covariances: bool,
        scale: Tensor | float | None,
    ) -> None:
        self.layers = [x.name for x in layers]
        self.scale = scale
        own = () if queries is None else queries.layers
        self._queries = {x.layer.name: x.gradients for x in own}
        self._placed: dict[str, QueryGradients] = {}
        self._Q = None if queries is None else len(queries)
        self.sums_covariances = covariances
        self._sums: dict[str, tuple[Sum, Sum, Tensor, Tensor]] = {}
        self._passes = 0
        self._scores: list[BatchScores] = []
        self._watch = Watch(
            model, layers, self._add, self._settled, queries is not None, lambda: self.scale
        )

    def take_scores(self) -> list[BatchScores]:
        """Scores of every forward pass whose backward pass has come, in the order of these.

        Where a gradient overflowed, so that the loop skips its step, a score is not finite.

        Raises:
            ArgumentError: no queries are captured against.
            ModelError: a layer did not run in one of them; names it.
        """
        if self._Q is None:
            raise ArgumentError("take_scores: capture was given no queries")
        self._watch.settle()
        taken, self._scores = self._scores, []
        return taken

    def take_covariances(self) -> dict[str, EmpiricalCovariance]:
        """Every layer's sums over the passes since they were last taken.

        Batches whose gradient is not finite are left out of `gradient`, with a `Notice`.

        Raises:
            ArgumentError: covariances are not captured.
            NotFiniteError: an input was not finite; names the layer.
        """
        if not self.sums_covariances:
            raise ArgumentError("take_covariances: capture was told covariances=False")
        self._watch.settle()
        sums, self._sums = self._sums, {}
        taken = {name: _covariance(*sums[name]) for name in self.layers if name in sums}
        for name, x in taken.items():
            if not bool(x.activation.isfinite().all()):
                raise NotFiniteError(f"layer {name}: what it read was not finite in this loop")
        lost = {n: x.activation_tokens - x.gradient_tokens for n, x in taken.items()}
        if any(lost.values()):
            name = max(lost, key=lambda n: lost[n])
            warnings.warn(
                f"gradients of up to {lost[name]} tokens (layer {name}) were not finite and are "
                "left out of the covariances",
                Notice,
                stacklevel=2,
            )
        return taken

    def _add(self, seen: LayerBatch, one: Pass) -> None:
        """A layer's gradient has come in the loop's backward pass."""
        name, dtype = seen.layer.name, wide(seen.g.dtype)
        if self._Q is not None:
            if name not in self._placed:
                moved = self._queries[name].each(lambda x: x.to(seen.g.device, seen.g.dtype))
                self._placed[name] = moved.laid_out()
            if one.result is None:
                one.result = Tally(self._Q, dtype)
            s = one.result.on(seen.g.device, one.grid.sequences)
            add_scores(s, self._placed[name], seen)
        if self.sums_covariances:
            self._add_covariances(seen, one)

    def _add_covariances(self, seen: LayerBatch, one: Pass) -> None:
        """cov += a a^T; cov += factor^2 g g^T, in full precision whatever the loop scales by."""
        layer, g = seen.layer, seen.tokens(seen.g)
        if layer.name not in self._sums:
            dtype, device = wide(g.dtype), g.device
            a, b = (Sum.zero(F, F, dtype=dtype, device=device) for F in (layer.J, layer.O))
            none = torch.zeros((), dtype=torch.int64, device=device)
            self._sums[layer.name] = a, b, none, none.clone()
        inputs, gradients, read, come = self._sums[layer.name]
        real = None if one.mask is None else seen.rows.real(one.mask)
        if one.mask is not None and real is None:
            raise ModelError(
                f"layer {layer.name} sees {seen.rows.positions} positions of "
                f"{seen.rows.sequences} sequences but the attention mask is "
                f"{list(one.mask.shape)}: which of them are padding cannot be told; leave it out "
                "of `layers`"
            )
        count = len(g) if real is None else real.sum()
        torch.ops.ekfac_fast.covariance(inputs.rest, seen.tokens(seen.a), real, layer.bias)
        own = torch.zeros_like(gradients.rest)
        torch.ops.ekfac_fast.covariance(own, g, None, False)
        assert one.factor is not None
        own *= torch.as_tensor(one.factor, device=own.device) ** 2
        finite = own.isfinite().all()
        gradients.rest += torch.where(finite, own, 0)
        read += count
        come += torch.where(finite, count, 0)

    def _settled(self, one: Pass) -> None:
        """A backward pass is over."""
        if self._Q is not None:
            assert one.factor is not None
            tokens, mask = (one.inputs.get(name) for name in ("input_ids", "attention_mask"))
            fits = tokens is not None and getattr(mask, "shape", None) == tokens.shape
            scores = one.result.total(one.factor)
            self._scores.append(BatchScores(scores, tokens, mask if fits else None))
        self._passes += 1
        if self._passes % BATCHES_A_FOLD == 0:
            for inputs, gradients, _, _ in self._sums.values():
                inputs.fold()
                gradients.fold()


def _covariance(inputs: Sum, gradients: Sum, read: Tensor, come: Tensor) -> EmpiricalCovariance:
    return EmpiricalCovariance(inputs.value(), gradients.value(), int(read), int(come))


@contextmanager
def capture(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    queries: Queries | None = None,
    covariances: bool | None = None,
    scale: Tensor | float | None = None,
) -> Iterator[Captured]:
    """Within the block, scores or covariances of every pass that the caller's loop trains with.

    The loop's gradients are bitwise those without it, and no hook is left after the block. It works
    under accumulation, autocast, gradient scaling and checkpoints (both kinds); a forward pass and
    its backward pass must both lie in the block, and passes without grad are not seen. Passes are
    the loop's own, with its dropout and the weights of that step; `queries` stay those of the
    weights that they were prepared on. Without dropout scores are those of `score` for the same
    weights, column for column of the batch.

    Per-sequence gradients are those of the *sum* of the batch's losses, whatever the loop's loss
    is a mean over. Where the loop's loss is made of the `loss` that a causal model of transformers
    returns for its labels, the divisor is known (and checked on the first pass), and what the loop
    does to that loss (accumulation, several processes, a scaler) is read from the gradient that
    arrives there. Any other loop says it: `scale`.

    Covariances are of the loop's own labels, the empirical Fisher's: see `EmpiricalCovariance`.

    Args:
        model: the very module that the loop calls; the first axis of its input holds the sequences.
        layers: as in `fit`; None for those of the queries, or the MLPs.
        queries: to be scored against, from `prepare_queries`.
        covariances: whether to sum them; None: where there are no queries.
        scale: what the loop's loss is to be multiplied with to be the sum (of a mean over n tokens,
            n); may be set before each backward pass (`captured.scale = n`). None: by the model's
            own loss.

    Raises:
        ArgumentError: parameters are shared, or queries are of other layers.
        ModelError: the model is compiled; later, in the loop: a layer runs twice in a pass, has no
            gradient, or its rows are not known by sequence; the loss's divisor is not known.
    """
    instance("model", model, nn.Module, "a torch module")
    if covariances is not None:
        flag("covariances", covariances)
    number = scale is None or isinstance(scale, Tensor) or is_number(scale)
    require(number, "scale", scale, "a number, or None for the model's own loss")
    wanted = queries is None if covariances is None else covariances
    if queries is None and not wanted:
        raise ArgumentError("capture: give queries to score against, or covariances=True")
    refuse_compiled(model)
    captured = Captured(model, _layers(model, layers, queries), queries, wanted, scale)
    try:
        captured._watch.start()
        yield captured
    finally:
        captured._watch.stop()


def _layers(
    model: nn.Module, layers: str | Sequence[str] | None, queries: Queries | None
) -> list[Layer]:
    """The layers to capture: dense ones, each a parameter of its own, all of the queries'."""
    if queries is not None:
        instance("queries", queries, Queries, "what prepare_queries returns")
        own = [x.layer for x in queries.layers]
        if layers is None:
            layers = [x.name for x in own]
    chosen = select_layers(model, layers)
    if queries is not None:
        names = {x.name: (x.O, x.J) for x in chosen}
        for x in own:
            if names.get(x.name) != (x.O, x.J) or x.also:
                raise ArgumentError(
                    f"layer {x.name} of the queries, [{x.O},{x.J}], is not among the layers to "
                    "capture: their scores are the sum over all of their layers"
                )
        if extra := names.keys() - {x.name for x in own}:
            raise ArgumentError(f"layer {min(extra)} is none of the queries'")
        _tell_of_other_weights(model, queries)
    linear = linear_layers(model)
    for x in chosen:
        if x.expert is not None or x.name not in linear:
            raise ArgumentError(
                f"layer {x.name} is captured in passes of our own alone (`fit`, `score`): leave "
                "routed experts, and what is no linear layer, out of `layers`"
            )
    tell_of_packed(model, chosen)
    return chosen


def _tell_of_other_weights(model: nn.Module, queries: Queries) -> None:
    """A `Notice` where a loop begins with other weights than the queries are of."""
    then = (queries.facts or {}).get("model")
    if then is not None and then != model_fingerprint(model):
        warnings.warn(
            "the model's weights or its configuration are not those that the queries were prepared "
            "on: scores are of these queries' gradients and the loop's own",
            Notice,
            stacklevel=4,
        )
