"""Proximal Bregman responses: of a linear model the damped solve, of a small GPT-2 nearly so."""

import numpy as np
import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, weight_gradient
from dense_newton import MADE, gauss_newton
from torch import nn

from ekfac_fast.errors import ArgumentError, Notice
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.validation import baselines
from ekfac_fast.validation.pbrf import responses

LAYERS = ["*.0.mlp.c_proj"]


def exact(model, task, data, questions, some, layers, damping):
    """grad f^T (H + damping)^-1 grad L, dense: [Q,len(some)]."""

    def gradients(examples, measure):
        rows = []
        for example in examples:
            loss = measure(example, model)
            rows.append(torch.cat([weight_gradient(model, x.name, loss).flatten() for x in layers]))
        return torch.stack(rows).detach()

    def one(example):
        if isinstance(task, LanguageModelTask):
            return batch_of(example | {"id": 0})
        return tuple(torch.as_tensor(part)[None] for part in example)

    H = gauss_newton(model, task, data, layers)
    H = H + damping * torch.eye(len(H), dtype=H.dtype)
    f = gradients(map(one, questions), task.compute_measurement)
    g = gradients([one(data[i]) for i in some], task.compute_train_loss)
    return f @ torch.linalg.solve(H, g.T)


def test_of_a_linear_model_it_is_the_damped_solve():
    _, task, data = MADE["regression"]()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(data[0][0].shape[-1], data[0][1].shape[-1])).double()
    some, layers = [0, 3, 5], select_layers(model, ["0"])
    expected = exact(model, task, data, data[:2], some, layers, 0.1)
    kept = model[0].weight.clone()
    more = {"damping": 0.1, "layers": ["0"], "task": task, "batch_size": 4}
    found = responses(model, data[:2], data, some, weight=1e-4, **more)
    close(found, expected, 1e-5)
    assert torch.equal(model[0].weight, kept)
    # However small the gradients are, L-BFGS learns the curvature.
    close(responses(model, data[:2], data, some, weight=1e-9, **more), expected, 1e-5)
    by_name = responses(model, data[:2], data, some, weight=1e-4, **more | {"damping": {"0": 0.1}})
    assert np.array_equal(by_name, found)


def test_of_a_language_model_the_exact_solve_is_nearer_than_the_dot_product():
    model, task = gpt2(torch.float64).eval(), LanguageModelTask()
    data, questions = corpus(3), asked(2)
    some, layers = [0, 1, 2], select_layers(model, LAYERS)
    solved = exact(model, task, data, questions, some, layers, 0.5)
    found = responses(model, questions, data, some, damping=0.5, layers=LAYERS, weight=1e-3)
    dot = baselines.gradient_dot(model, questions, data, layers=LAYERS)[:, some]

    def correlation(x):
        return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(np.asarray(x), found, strict=True)])

    assert correlation(solved) > 0.999
    assert correlation(dot) < correlation(solved)
    close(found, solved, 0.02)


class Bare:
    """A task that keeps its outputs to itself."""

    def compute_train_loss(self, batch, model, sample=False):
        raise AssertionError

    def compute_measurement(self, batch, model):
        raise AssertionError

    def get_attention_mask(self, batch):
        raise AssertionError

    def get_influence_tracked_modules(self):
        raise AssertionError


def test_refusals():
    model, data = gpt2(), corpus()
    with pytest.raises(ArgumentError, match="examples is 12, expected indices of 12 examples"):
        responses(model, asked(), data, [0, 12], damping=0.1)
    with pytest.raises(ArgumentError, match="weight is -1"):
        responses(model, asked(), data, [0], damping=0.1, weight=-1)

    with pytest.warns(Notice, match="example 0: after 1 steps .* of the gradient is left"):
        responses(model, asked(1), data, [0], damping=1e-6, steps=1)
    with pytest.raises(ArgumentError, match="Bare does not tell its outputs"):
        responses(model, asked(), data, [0], damping=0.1, task=Bare())


class Smooth(LanguageModelTask):
    """A loss of its own, of which the outputs are not told."""

    def compute_train_loss(self, batch, model, sample=False):
        return 0.1 * super().compute_train_loss(batch, model, sample)


def test_a_loss_of_its_own_is_not_taken_for_cross_entropy():
    with pytest.raises(ArgumentError, match="Smooth does not tell its outputs"):
        responses(gpt2(), asked(), corpus(), [0], damping=0.1, task=Smooth())
