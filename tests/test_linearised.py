"""Products with the Gauss-Newton matrix against Jacobians that are written out."""

from functools import partial

import pytest
import torch
from dense_ekfac import close, gpt2
from dense_newton import MADE, chosen, flat, gauss_newton, in_fp64, language  # noqa: F401
from torch import nn
from torch.nn import functional as F

from ekfac_fast.errors import ModelError
from ekfac_fast.model import head
from ekfac_fast.model.linearised import Linearised
from ekfac_fast.model.tasks import linear_outputs
from ekfac_fast.stages.run import Run

Q = 3


def products(model, task, data, layers, **arguments):
    """(dW, mean of J^T H J dW) of random directions, in batches."""
    run, linearised = Run(model, data, {"task": task} | arguments), Linearised(model, layers)
    torch.manual_seed(1)
    dW = {x.name: torch.randn(Q, x.O, x.J, dtype=torch.float64) for x in layers}
    sums = {name: torch.zeros_like(x) for name, x in dW.items()}
    for batch in run.batches.divided():
        outputs = partial(linear_outputs, run.task, run.batches.load(batch), model)
        linearised.add_product(outputs, dW, sums)
    return dW, {name: x / len(data) for name, x in sums.items()}


@pytest.mark.parametrize("name", MADE)
def test_product_is_that_of_the_dense_matrix(name, in_fp64):  # noqa: F811
    model, task, data = MADE[name]()
    layers = chosen(model, name)
    H = gauss_newton(model, task, data, layers)
    dW, found = products(model, task, data, layers, batch_tokens=14, batch_size=5)
    close(flat(found, layers), flat(dW, layers) @ H, 1e-10)


@pytest.mark.parametrize("way", ["a few rows", "whole logits"])
def test_every_way_to_the_head_is_the_same(way, monkeypatch):
    model, task, data = MADE["GPT-2"]()
    layers = chosen(model, "GPT-2")
    _, expected = products(model, task, data, layers)
    if way == "a few rows":
        monkeypatch.setattr(head, "LOGITS", 1)
    else:
        monkeypatch.setattr(head, "inspect_head", lambda *_: None)
        monkeypatch.setattr("ekfac_fast.model.tasks.states", lambda *_: None)
        monkeypatch.setattr("ekfac_fast.model.linearised.OUTPUT_BYTES", 1)
    _, found = products(model, task, data, layers)
    close(flat(found, layers), flat(expected, layers), 1e-12)


def test_products_of_onednn_are_differentiated_twice(monkeypatch):
    exact, task, data = MADE["GPT-2"]()
    layers = chosen(exact, "GPT-2")
    _, expected = products(exact, task, data, layers)
    monkeypatch.setattr("ekfac_fast.ops.products.WORTHWHILE", 0)
    _, found = products(gpt2(), task, data, layers)
    close(flat(found, layers), flat(expected, layers), 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_is_switched_for_the_pass_alone(attention):
    model, task, data = MADE["Llama"]()
    layers = chosen(model, "Llama")
    model.float()
    _, expected = products(model, task, data, layers)
    model.set_attn_implementation(attention)
    _, found = products(model, task, data, layers)
    close(flat(found, layers), flat(expected, layers), 1e-5)
    assert model.config._attn_implementation == attention


def test_a_model_in_bf16_has_attention_that_is_differentiated_twice():
    """Not our own backward pass of attention, which is differentiable once."""
    model, task, data = MADE["Llama"]()
    layers = chosen(model, "Llama")
    model.set_attn_implementation("sdpa")
    _, expected = products(model.float(), task, data, layers)
    _, found = products(model.bfloat16(), task, data, layers)
    close(flat(found, layers), flat(expected, layers), 0.1)


class Twice(nn.Module):
    """One layer used twice, and an activation that changes its output in place."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.change = nn.Linear(3, 3), nn.Linear(3, 2), change
        self.double()

    def forward(self, x):
        return self.b(self.a(self.change(self.a(x))))


def test_a_layer_used_twice_and_changed_in_place():
    _, task, data = MADE["regression"](4)
    model = Twice(lambda s: s.tanh_())
    layers = chosen(model, "")
    H = gauss_newton(model, task, data, layers)
    dW, found = products(model, task, data, layers)
    close(flat(found, layers), flat(dW, layers) @ H, 1e-12)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


def test_a_model_that_cannot_be_differentiated_twice_is_refused():
    _, task, data = MADE["regression"](4)
    model = Twice(Once.apply)
    with pytest.raises(ModelError, match=r"cannot be differentiated twice.*differ"):
        products(model, task, data, chosen(model, ""))


def test_a_loss_without_curvature_has_none():
    class Linear(type(MADE["regression"]()[1])):
        def compute_output_loss(self, outputs, batch):
            return F.l1_loss(outputs, outputs.detach() + 1, reduction="sum")

    model, _, data = MADE["regression"](4)
    _, found = products(model, Linear(), data, chosen(model, ""))
    assert not any(x.any() for x in found.values())
