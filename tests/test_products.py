"""Linear layers of frozen models on oneDNN: the same numbers, and nothing is left behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ekfac_fast.ops import products
from ekfac_fast.ops.products import Products

pytestmark = pytest.mark.skipif(not products.available(), reason="no AVX-512 or no oneDNN")


class Counted(Products):
    taken = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        name = type(result.grad_fn).__name__ if isinstance(result, torch.Tensor) else ""
        self.taken += name == "_LinearBackward"
        return result


@pytest.fixture
def everything_pays(monkeypatch):
    monkeypatch.setattr(products, "WORTHWHILE", 1)


@pytest.mark.parametrize("shape", [(5, 7, 33), (40, 33), (2, 3, 4, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("everything_pays")
def test_products_against_fp64(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(33, 17, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    with Counted() as mode:
        y = layer(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert mode.taken == 1
    wide = x.detach().double().requires_grad_()
    expected = F.linear(wide, layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected.square().sum(), wide)
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("everything_pays")
def test_weights_with_the_sides_exchanged():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 33, requires_grad=True), torch.randn(33, 17), torch.randn(17)
    with Counted() as mode:
        y = torch.addmm(bias, x, weight)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert mode.taken == 1
    torch.testing.assert_close(y, torch.addmm(bias, x, weight))
    torch.testing.assert_close(dx, torch.ones(9, 17) @ weight.mT)


@pytest.mark.usefixtures("everything_pays")
def test_what_is_left_to_torch():
    x, W = torch.randn(9, 33, requires_grad=True), torch.randn(17, 33)
    with Counted() as mode:
        F.linear(x, W.clone().requires_grad_())  # its gradient is wanted
        F.linear(x.double(), W.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, W).dtype == torch.bfloat16
        torch.vmap(lambda row: F.linear(row[None], W))(x)
    assert mode.taken == 0


def test_small_products_are_left_alone():
    with Counted() as mode:
        F.linear(torch.randn(9, 33, requires_grad=True), torch.randn(17, 33))
    assert mode.taken == 0
