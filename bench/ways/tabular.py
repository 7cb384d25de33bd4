"""Small networks on scikit-learn's real data sets, trained, with tasks that tell their outputs."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SETS = ("diabetes", "wine", "breast cancer", "digits")
HIDDEN, STEPS, RATE = 16, 40, 1e-2
TEST_SHARE = 0.1


class Regression:
    """Squared error of (input, target), summed; a label that is sampled has variance 1/2."""

    def compute_outputs(self, batch: tuple, model: nn.Module) -> Tensor:
        """[B,1]"""
        return model(batch[0])

    def compute_output_loss(self, outputs: Tensor, batch: tuple) -> Tensor:
        """What the outputs cost."""
        return F.mse_loss(outputs, batch[1], reduction="sum")

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        """With labels drawn from the model, or the data's."""
        outputs = self.compute_outputs(batch, model)
        drawn = outputs.detach() + 0.5**0.5 * torch.randn_like(outputs)
        return self.compute_output_loss(outputs, (batch[0], drawn) if sample else batch)

    def compute_measurement(self, batch: tuple, model: nn.Module) -> Tensor:
        """The loss."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """All layers."""
        return ["all"]

    def get_attention_mask(self, batch: tuple) -> None:
        """No padding."""


class Classification(Regression):
    """Cross-entropy of classes, summed."""

    def compute_output_loss(self, outputs: Tensor, batch: tuple) -> Tensor:
        """What the logits cost."""
        return F.cross_entropy(outputs, batch[1], reduction="sum")

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        """With classes drawn from the model, or the data's."""
        outputs = self.compute_outputs(batch, model)
        drawn = torch.multinomial(outputs.detach().softmax(-1), 1)[:, 0]
        return self.compute_output_loss(outputs, (batch[0], drawn) if sample else batch)


@dataclass
class Case:
    """A trained model, in fp64, and what is asked of it."""

    name: str
    model: nn.Module
    data: list
    queries: list
    task: Regression

    def single(self) -> "Case":
        """The same in fp32."""

        def lowered(examples: list) -> list:
            return [tuple(x.float() if x.is_floating_point() else x for x in e) for e in examples]

        model = copy.deepcopy(self.model).float()
        return replace(self, model=model, data=lowered(self.data), queries=lowered(self.queries))


def tabular(name: str, queries: int, steps: int = STEPS) -> Case:
    """A network of three layers on one of `SETS`, and held-out examples as queries."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{name.replace(' ', '_')}")()
    x, y = found.data, found.target
    order = np.random.default_rng(0).permutation(len(x))
    held = max(queries, int(TEST_SHARE * len(x)))
    train = order[held:]
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-9)
    inputs = torch.tensor(x, dtype=torch.float64)
    regression = name == "diabetes"
    if regression:
        y = (y - y[train].mean()) / y[train].std()
        targets, task = torch.tensor(y, dtype=torch.float64)[:, None], Regression()
    else:
        targets, task = torch.tensor(y), Classification()
    torch.manual_seed(0)
    out = 1 if regression else int(y.max()) + 1
    model = nn.Sequential(
        nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
        nn.Linear(HIDDEN, out),
    ).double()  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    batch = (inputs[train], targets[train])
    for _ in range(steps):
        optimiser.zero_grad()
        (task.compute_train_loss(batch, model) / len(train)).backward()
        optimiser.step()
    examples = [(inputs[i], targets[i]) for i in order]
    return Case(name, model.eval(), examples[held:], examples[:queries], task)
