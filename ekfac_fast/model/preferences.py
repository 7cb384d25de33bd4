"""Pairs of which one side is preferred: direct preference optimisation and reward models.

    loss = -log sigmoid(m)     m = r(chosen) - r(rejected), of a reward model
                               m = beta (h - h_ref), h = log p(chosen) - log p(rejected)
    y = +1 with probability sigmoid(m), else -1, and the drawn loss is -log sigmoid(y m)

A pair is one training example, and its gradient that of its pair's loss: tokens of both sides are
its rows. The Fisher is that of the pair's label, which of the two is preferred, drawn from the
model's own sigmoid (Bradley-Terry); not of the tokens.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import is_number, require
from ..data.choices import Measure
from ..data.forms import REFERENCES, Form, pair_form
from ..errors import ArgumentError
from .classification import Classified, outputs_of
from .sampling import EDGE
from .tasks import LanguageModelTask
from .text_tasks import OutputTask, padding_form

# How far DPO lets a model go from its reference.
BETA = 0.1


class PairTask(OutputTask):
    """What both have in common: the loss of a pair's m, and whose label is drawn."""

    def losses(self, z: Tensor, batch: Any) -> Tensor:
        """-log sigmoid(y m), y = 1 where no label was drawn: [B]."""
        return F.softplus(-z * batch.get("preferred", 1))

    def margins(self, z: Tensor, batch: Any) -> Tensor:
        """m: [B]."""
        return z

    def drawn(self, z: Tensor, batch: Any) -> dict[str, Any]:
        """Which side is preferred, by the model: +1 the first, -1 the second."""
        u, p = self.uniform(batch, 1)[:, 0], z.double().sigmoid()
        self._edges = self._edges + ((u - p).abs() < EDGE).sum()
        return batch | {"preferred": (u < p).to(z.dtype) * 2 - 1}


class RewardTask(PairTask, Classified):
    """Reward models on pairs, Bradley-Terry: `AutoModelForSequenceClassification` with one output.

    Examples are pairs: `input_ids` of the chosen and the rejected side end to end, and `sides`,
    their lengths (`data.read_pairs`). A query is a pair, too.

    Args:
        measure: "loss" of a query's pair, or "margin", minus m.
        seed: of drawn labels.
    """

    def form(self, model: nn.Module) -> Form:
        """Pairs."""
        if (K := outputs_of(model)) != 1:
            raise ArgumentError(
                f"RewardTask: the model has {K} outputs; a reward is one (num_labels=1)"
            )
        return padding_form(model, Form(None, sides=(2,)))

    def compute_outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """m = r(chosen) - r(rejected): [B]."""
        r = self.logits(batch, model)[:, 0]
        return r[0::2] - r[1::2]


class PreferenceTask(PairTask, LanguageModelTask):
    """Direct preference optimisation (DPO) of a causal language model.

    Examples are pairs with labels -100 on the prompt, and the log-probabilities of their sides
    under the reference model, `ref_chosen_logps` and `ref_rejected_logps`, as TRL calls them
    (`referenced` adds them). The loss is TRL's "sigmoid", without label smoothing. A query is a
    pair; for other questions to the same model (a completion, one against another) give
    `prepare_queries` a `LanguageModelTask`.

    Args:
        beta: of the loss.
        measure: "loss" of a query's pair, or "margin", minus m.
        seed: of drawn labels.
    """

    def __init__(self, beta: float = BETA, measure: Measure = "loss", seed: int = 0):
        super().__init__(measure, seed)
        require(is_number(beta) and beta > 0, "beta", beta, "a number > 0")
        self.beta = float(beta)

    def form(self, model: nn.Module) -> Form:
        """Pairs, with their log-probabilities under the reference."""
        return pair_form(REFERENCES)

    def query_form(self, model: nn.Module) -> Form:
        """As of the training data."""
        return self.form(model)

    def compute_outputs(self, batch: Any, model: nn.Module) -> Tensor:
        """m: [B]."""
        nll = self.negative_log_likelihoods(batch, model)
        chosen, rejected = (batch[name].to(nll.dtype) for name in REFERENCES)
        return self.beta * (nll[1::2] - nll[0::2] - (chosen - rejected))
