"""By what a training loop divides its loss: the sum of cross-entropies over what it is the mean of.

A causal model of transformers that is given labels returns

    loss = sum_t -log p(y_t) / M          M = num_items_in_batch, or how many labels are predicted

and a loop goes on to c loss (accumulation, several processes, a gradient scaler). The gradient c
that arrives at `loss` in the backward pass tells the rest: M / c of the loop's loss is the sum.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.examples import IGNORED
from ..errors import ModelError
from ..ops.shapes import wide
from .products import near

ASK = (
    "say by `scale` what its gradients are to be multiplied with to be those of a sum over the "
    "batch's losses (of a mean over n tokens n; also captured.scale = n, before backward)"
)


def own_loss(inputs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor | float] | None:
    """(loss, M) of a forward pass whose output has a loss of its own labels; None of any other."""
    loss = _part(output, "loss")
    labels = _predicted(inputs)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad or labels is None:
        return None
    items = inputs.get("num_items_in_batch")
    if items is None:
        return loss, (labels != IGNORED).sum()
    return loss, items.detach() if isinstance(items, Tensor) else float(items)


@torch.no_grad()
def check_own_loss(inputs: Mapping[str, Any], output: Any, loss: Tensor, M: Tensor | float) -> None:
    """Refuse a loss that is not the sum of cross-entropies over M.

    Raises:
        ModelError: it is not (label smoothing, a loss of its own, one for routers added to it), or
            there are no logits to tell by.
    """
    labels, logits = _predicted(inputs), _part(output, "logits")
    assert labels is not None
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[:-1] != labels.shape:
        raise ModelError(
            f"the model returns a loss without a row of logits a label: how many losses it is the "
            f"mean of cannot be checked; {ASK}"
        )
    z = logits.detach().to(wide(logits.dtype))
    with torch.autocast(z.device.type, enabled=False):
        total = F.cross_entropy(
            z.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    found = float(loss.detach() * M)
    if abs(found - float(total)) > 1e-4 * abs(float(total)):
        raise ModelError(
            f"the model's loss times {float(M):g} is {found:.6g}, and its labels' cross-entropies "
            f"sum to {float(total):.6g}: it is another loss than their mean; {ASK}"
        )


def logits_of(output: Any) -> Tensor | None:
    """A model's logits, where a gradient can come back to them."""
    logits = _part(output, "logits")
    return logits if isinstance(logits, Tensor) and logits.requires_grad else None


def predicts(inputs: Mapping[str, Any]) -> bool:
    """Whether any position has a label."""
    labels = _predicted(inputs)
    return labels is not None and bool((labels != IGNORED).any())


def only_loss(inputs: Mapping[str, Any], logits: Tensor) -> Callable[[Tensor, float], None]:
    """Looks at the gradient g [B,T,V] that comes back to logits whose loss has gradient c / M.

    g_t = (softmax(z_t) - onehot(y_t)) c / M where nothing but the loss is made of z: at the first
    position that has a label.

    Raises:
        ModelError: it is another: the loop's loss has a further term (z-loss, KL, distillation).
    """
    labels = _predicted(inputs)
    assert labels is not None
    labels = labels.flatten()
    at = int((labels != IGNORED).nonzero()[0])
    z = logits.detach().flatten(0, -2)[at]
    row = z.to(wide(z.dtype)).softmax(-1)
    row[labels[at]] -= 1

    def check(g: Tensor, share: float) -> None:
        found = g.detach().flatten(0, -2)[at]
        if math.isfinite(share) and not near(row * share, found):
            raise ModelError(
                "the loop's loss has a term of the model's logits beside the loss that the model "
                f"returned: by what a sequence's gradients are divided cannot be told; {ASK}"
            )

    return check


def _predicted(inputs: Mapping[str, Any]) -> Tensor | None:
    """What every position predicts, as transformers shifts labels: [B,T]."""
    if isinstance(shifted := inputs.get("shift_labels"), Tensor):
        return shifted
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _part(output: Any, name: str) -> Any:
    """A part of a model's output by its name."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
