"""What a task of a user's returns: sums over the batch, one number, drawn by the run's seed."""

import re
from pathlib import Path

import pytest
import torch
from plain_tasks import Plain
from torch import nn
from torch.utils.data import Subset, TensorDataset

from ekfac_fast import Queries, fit, prepare_queries, score, self_scores
from ekfac_fast.errors import ArgumentError, DataError, StoreError

torch.manual_seed(0)
DATA = TensorDataset(torch.randn(40, 3), torch.randn(40, 2))
ASKED = Subset(DATA, range(3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x):
        return self.lin(x)


class Regression(Plain):
    """Squares of both outputs; `of` what becomes of a batch of them, by method."""

    def __init__(self, train=torch.sum, measure=torch.sum):
        super().__init__()
        self.train, self.measure = train, measure

    def squares(self, batch, model, noise=0.0):
        z = model(batch[0])
        y = z.detach() + noise * torch.randn_like(z) if noise else batch[1]
        return ((z - y) ** 2).sum(1)

    def compute_train_loss(self, batch, model, sample=False):
        return self.train(self.squares(batch, model, 0.5**0.5 if sample else 0.0))

    def compute_measurement(self, batch, model):
        return self.measure(self.squares(batch, model))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Net()


def each(x):
    return x


@pytest.mark.parametrize("of", [each, lambda x: x[:, None], lambda x: x.sum().item()])
def test_losses_and_measurements_that_are_no_number_are_refused(of, model, tmp_path):
    with pytest.raises(ArgumentError, match=r"compute_train_loss returned .* expected one number"):
        fit(model, DATA, out=tmp_path / "a", task=Regression(train=of), layers="all")
    factors = fit(model, DATA, out=tmp_path / "f", task=Regression(), layers="all")
    with pytest.raises(ArgumentError, match=r"compute_measurement returned .* expected one number"):
        prepare_queries(model, factors, ASKED, task=Regression(measure=of))


def test_a_measurement_that_is_a_mean_is_refused(model, tmp_path):
    factors = fit(model, DATA, out=tmp_path / "f", task=Regression(), layers="all")
    mean = Regression(measure=torch.mean)
    with pytest.raises(ArgumentError, match=r"compute_measurement is .* of queries 0, 1, 2, and"):
        prepare_queries(model, factors, ASKED, task=mean)
    whole = prepare_queries(model, factors, ASKED, task=Regression(), rank=None)
    alone = prepare_queries(model, factors, ASKED, task=mean, rank=None, batch_size=1)
    torch.testing.assert_close(alone.preconditioned("lin"), whole.preconditioned("lin"))


def test_draws_of_a_task_are_those_of_the_seed(model, tmp_path):
    """Whatever torch's own generator has come to, which goes on as it was."""
    found = {}
    for name, seed in (("a", None), ("b", None), ("c", 3), ("d", 3)):
        torch.manual_seed(ord(name))
        expected = torch.get_rng_state()
        factors = fit(
            model, DATA, out=tmp_path / name, task=Regression(), layers="all", seed=seed,
            batch_size=7,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), expected)
        found[name] = factors["lin"].lam, factors["lin"].Qg
    for one, other in (("a", "b"), ("c", "d")):
        assert all(map(torch.equal, found[one], found[other]))
    assert not torch.equal(found["a"][0], found["c"][0])
    with pytest.raises(StoreError, match="seed"):
        fit(model, DATA, out=tmp_path / "c", task=Regression(), layers="all", batch_size=7)


def test_tasks_are_instances_that_are_called_by_keyword(model, tmp_path):
    with pytest.raises(ArgumentError, match=r"task is the class Regression, .*: Regression\(\)"):
        fit(model, DATA, out=tmp_path, task=Regression, layers="all")

    class Other(Regression):
        def compute_measurement(self, data, model):
            return super().compute_measurement(data, model)

    with pytest.raises(ArgumentError, match=r"called by keyword, as compute_measurement\(batch, m"):
        fit(model, DATA, out=tmp_path, task=Other(), layers="all")


def test_the_documented_task_runs(model, tmp_path):
    """The example of docs/questions.md, as it stands there: scores are iHVP . gradient."""
    page = (Path(__file__).parents[1] / "docs/questions.md").read_text()
    _, snippet = re.findall(r"```python\n(.*?)```", page, re.S)
    space = {}
    exec(snippet, space)
    found = space["explained"](model, DATA, ASKED, tmp_path)
    queries = Queries.load(tmp_path / "queries")
    for index, (x, y) in enumerate(DATA):
        z = model(x)
        gradient = torch.outer(2 * (z - y), torch.cat([x, torch.ones(1)])).detach()
        expected = (queries.preconditioned("lin") * gradient).sum((1, 2))
        torch.testing.assert_close(torch.tensor(found.matrix[:, index]), expected)


def test_data_that_does_not_fit_is_told_the_task(model, tmp_path):
    factors = fit(model, DATA, out=tmp_path / "f", task=Regression(), layers="all")
    queries = prepare_queries(model, factors, ASKED, task=Regression())
    for call in (
        lambda: prepare_queries(model, factors, ASKED),
        lambda: score(model, queries, DATA, out=tmp_path / "s"),
        lambda: self_scores(model, factors, DATA, out=tmp_path / "g"),
    ):
        with pytest.raises(DataError, match=r"\. The factors were fitted with Regression: give"):
            call()


def test_scores_do_not_depend_on_the_batches(model, tmp_path):
    found = []
    for size in (1, 4, 16):
        out, task = tmp_path / str(size), Regression()
        factors = fit(model, DATA, out=out / "f", task=task, layers="all", batch_size=5)
        queries = prepare_queries(model, factors, ASKED, task=task, batch_size=size)
        found.append(score(model, queries, DATA, out=out / "s", task=task, batch_size=size).matrix)
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]))
    assert abs(found[0]).min() > 0
