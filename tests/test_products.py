"""Linear layers of frozen models on other products: the same numbers, nothing is left behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ekfac_fast.ops import products
from ekfac_fast.ops.products import Products

onednn = pytest.mark.skipif(not products.available(), reason="no AVX-512 or no oneDNN")


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


@onednn
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


@onednn
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


@onednn
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


@pytest.fixture
def unmultiplied(everything_pays, monkeypatch):
    """A processor without products of 16-bit numbers."""
    monkeypatch.setattr(
        products, "multiplied", lambda dtype: dtype not in (torch.bfloat16, torch.float16)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.usefixtures("unmultiplied")
def test_16_bits_are_multiplied_in_fp32_where_nothing_multiplies_them(dtype, autocast, exchanged):
    torch.manual_seed(0)
    x, W, b = torch.randn(9, 33), torch.randn(17, 33), torch.randn(17)
    if not autocast:
        x, W, b = x.to(dtype), W.to(dtype), b.to(dtype)
    x.requires_grad_()
    with Counted() as mode, torch.autocast("cpu", dtype, enabled=autocast):
        y = torch.addmm(b, x, W.mT.contiguous()) if exchanged else F.linear(x, W, b)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert mode.taken == 1
    assert y.dtype == dtype
    assert dx.dtype == x.dtype
    wide = x.detach().to(dtype).double(), W.to(dtype).double(), b.to(dtype).double()
    torch.testing.assert_close(y, F.linear(*wide).to(dtype), rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(
        dx, (dy.double() @ wide[1]).to(dtype).to(x.dtype), rtol=2e-2, atol=1e-3
    )


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.usefixtures("unmultiplied")
def test_a_model_in_bf16_is_widened(autocast):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    model = model if autocast else model.bfloat16()
    x = torch.randn(2, 12, 64, dtype=next(model.parameters()).dtype).requires_grad_()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0

    def gradient(mode) -> torch.Tensor:
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            labels = torch.arange(24).view(2, 12)
            loss = model(inputs_embeds=x, attention_mask=mask, labels=labels).loss
        return torch.autograd.grad(loss, x)[0].float()

    plain, ours = gradient(torch.enable_grad()), gradient(mode := Counted())
    assert mode.taken == 15  # seven of each block, and the head
    assert (ours - plain).norm() <= 3e-2 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("O", "I"), [(57, 40), (40, 57), (57, 41), (16, 24)])
def test_odd_widths_in_even_parts(O, I, bias, dtype):
    """What GPUs make of a vocabulary of 50257 words, forth and back."""
    x, W, b = torch.randn(9, I), torch.randn(O, I), torch.randn(O)
    x, W, b = (y.to(dtype) for y in (x, W, b))
    b = b if bias else None
    exact = F.linear(*(y if y is None else y.double() for y in (x, W, b)))
    for these in (W, W.t().contiguous().t()):
        got = products.in_even_parts(x, these, b).double()
        assert (got - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
