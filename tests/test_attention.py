"""Attention in bf16: as exact as PyTorch's own, in its place while `Products` is entered."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ekfac_fast.ops import attention as module
from ekfac_fast.ops.attention import LONGEST, attention, pays
from ekfac_fast.ops.products import Products, multiplied

pytestmark = pytest.mark.skipif(not module.available(), reason="another PyTorch")


def inputs(B: int, H: int, T: int, S: int, D: int) -> list[Tensor]:
    """Q, K, V as models have them, and the gradient of O."""
    rng = torch.Generator().manual_seed(T)
    each = [torch.randn(B, n, H, D, generator=rng) for n in (T, S, S, T)]
    return [x.bfloat16().transpose(1, 2).requires_grad_() for x in each]


def keep(kind: str, B: int, T: int, S: int) -> Tensor | None:
    """What is seen, [B,1,T,S]: the last columns of the first sequence are not."""
    if kind == "causal":
        return None
    seen = torch.ones(B, 1, T, S, dtype=torch.bool).tril()
    seen[0, ..., S // 2 :] = False
    if kind == "nothing":
        seen[0, :, 0] = False
    return seen


def gradients(f, *leaves: Tensor) -> tuple[Tensor, ...]:
    *leaves, dO = leaves
    return torch.autograd.grad(f(*leaves), leaves, dO)


@pytest.mark.parametrize("shape", [(8, 3, 128, 128, 16), (2, 5, 37, 37, 32), (1, 2, 5, 9, 8)])
@pytest.mark.parametrize("kind", ["causal", "bool", "added", "nothing"])
def test_gradients_are_as_exact_as_pytorchs(kind, shape):
    B, _, T, S, _ = shape
    causal, seen = kind == "causal", keep(kind, B, T, S)
    mask = seen
    if kind == "added":
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).bfloat16()
    leaves = inputs(*shape)
    whole = [x.detach().double().requires_grad_() for x in leaves]
    right = gradients(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=seen, is_causal=causal), *whole
    )
    theirs = gradients(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=causal), *leaves
    )
    ours = gradients(lambda *x: attention(*x, mask, causal), *leaves)
    for x, y, z in zip(ours, theirs, right, strict=True):
        assert (x - z).norm() <= 1.3 * (y - z).norm() + 1e-3 * z.norm()


def test_a_scale_and_one_mask_for_all_sequences():
    leaves = inputs(3, 2, 11, 11, 8)
    mask = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    theirs = gradients(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask, scale=0.7), *leaves
    )
    ours = gradients(lambda *x: attention(*x, mask, scale=0.7), *leaves)
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).norm() <= 8e-3 * y.norm()


def test_what_it_is_not_for():
    Q, K, V, _ = inputs(1, 2, LONGEST + 1, 3, 8)
    assert not pays(Q, K, V)
    Q, K, V, _ = inputs(1, 2, 7, 7, 8)
    assert pays(Q, K, V)
    assert not pays(Q.detach(), K.detach(), V.detach())
    assert not pays(Q[0], K[0], V[0])
    assert not pays(Q, K[:, :1], V[:, :1])


@pytest.mark.skipif(not multiplied(torch.bfloat16), reason="no products of bf16")
@pytest.mark.parametrize("autocast", [True, False])
def test_a_model_with_grouped_queries_takes_it(autocast, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=50,
        )
    ).requires_grad_(False)  # fmt: skip
    if not autocast:
        model = model.bfloat16()
    x = torch.randn(2, 12, 64, dtype=next(model.parameters()).dtype).requires_grad_()
    taken: list[int] = []
    monkeypatch.setattr(module._Attention, "backward", _counted(taken))

    def gradient(mode) -> Tensor:
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(inputs_embeds=x, labels=torch.arange(24).view(2, 12)).loss
        return torch.autograd.grad(loss, x)[0].float()

    plain = gradient(torch.enable_grad())
    assert not taken
    ours = gradient(Products())
    assert len(taken) == 2
    assert (ours - plain).norm() <= 3e-2 * plain.norm()


def _counted(taken: list[int]):
    own = module._Attention.backward

    def backward(ctx, *grads):
        taken.append(1)
        return own(ctx, *grads)

    return staticmethod(backward)
