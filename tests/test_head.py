"""The head and the loss as one piece, and labels drawn on the way, against whole logits in fp64."""

from unittest.mock import patch

import pytest
import torch
import transformers as T
from dense_ekfac import VOCABULARY, close, corpus, gpt2, llama
from torch import nn
from torch.nn import functional as F

from ekfac_fast import LanguageModelTask, fit, self_scores
from ekfac_fast.data.batches import Batches
from ekfac_fast.model import head as heads
from ekfac_fast.model.alone import alone
from ekfac_fast.model.capture import Capture
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.sampling import BLOCK, inverted, uniforms


@pytest.mark.parametrize("V", [7, BLOCK, 3 * BLOCK, 5 * BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_invert_the_cumulative_distribution(V, dtype):
    generator = torch.Generator().manual_seed(V)
    p = (4 * torch.randn(50, V, generator=generator, dtype=dtype)).softmax(-1)
    p[:, ::3] = 0  # their sum may be off 1
    uniform = torch.rand(3, 50, generator=generator, dtype=torch.float64)
    uniform[0, 0], uniform[0, 1] = 0.0, 1 - 2**-53
    labels, edges = inverted(p, uniform)
    cdf = p.double().cumsum(-1)
    expected = torch.searchsorted(cdf, (uniform * cdf[:, -1]).mT.contiguous(), right=True).mT
    different = labels != expected
    assert int(different.sum()) <= int(edges)
    assert bool((p[torch.arange(50), labels] > 0).all())


def test_labels_follow_the_model():
    model, draws = gpt2(), 4000
    ids = torch.tensor([corpus(1)[0]["input_ids"][:4]])
    uniform = uniforms(3, torch.arange(draws), torch.ones(draws, 4), [0])[0, :, :3]
    with torch.no_grad():
        p = model(input_ids=ids).logits[0, :-1].softmax(-1)
    for t in range(3):
        labels, _ = inverted(p[t].expand(draws, -1), uniform[None, :, t])
        counts = torch.bincount(labels[0], minlength=VOCABULARY) / draws
        # Total variation of an empirical distribution: about sqrt(V / (2 pi n)).
        assert (counts - p[t]).abs().sum() / 2 < 2 * (VOCABULARY / (6.28 * draws)) ** 0.5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("draws", [None, 1, 3])
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, bias, draws):
    monkeypatch.setattr(heads, "LOGITS", 4 * 700 * 5)  # five rows at a time
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(24, 700, bias=bias).double().requires_grad_(False)
    h = torch.randn(3, 7, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 700, (3, 7), generator=generator)
    labels[0, 4:] = labels[2] = -100
    uniform = None
    if draws:
        uniform = torch.rand(draws, 3, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(draws or 1, 3, 7, generator=generator, dtype=torch.float64)

    losses, _ = heads.token_losses(h, head, labels, heads.predicting(labels), uniform)
    (own,) = torch.autograd.grad((losses * weights).sum(), h)

    logits = head(h)
    chosen = labels[None]
    if uniform is not None:
        cdf = logits.detach().softmax(-1).cumsum(-1)
        chosen = torch.stack([torch.searchsorted(cdf, u.unsqueeze(-1)) for u in uniform])
        chosen = chosen.squeeze(-1).where(labels >= 0, -100)
    expected = torch.stack(
        [F.cross_entropy(logits.mT, y, reduction="none", ignore_index=-100) for y in chosen]
    )
    close(losses, expected, 1e-12)
    close(own, torch.autograd.grad((expected * weights).sum(), h)[0], 1e-12)


def softcapped():
    config = T.Gemma2Config(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=24,
        attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return T.Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "whole_ones"),
    [(gpt2, False), (llama, False), (softcapped, True)],
    ids=["gpt2", "llama", "softcap"],
)
def test_logits_exist_whole_only_where_something_is_made_of_them(tmp_path, make, whole_ones):
    model, data, seen = make().eval(), corpus(4), []
    factors = fit(model, data, out=tmp_path / "f")
    head, forward = model.get_output_embeddings(), nn.Linear.forward

    def watched(module, x):
        if module is head:
            seen.append(x.shape[:-1].numel())
        return forward(module, x)

    with patch.object(nn.Linear, "forward", watched):
        own = self_scores(model, factors, data, out=tmp_path / "s", batch_tokens=1)
    # The last pass of each: after the checks.
    assert all(bool(x) == whole_ones for x in seen[-4:])
    heads._last.pop(model, None)
    task = LanguageModelTask()
    task.check = lambda *_: 0  # never inspected: logits are whole
    whole = self_scores(model, factors, data, out=tmp_path / "w", batch_tokens=1, task=task)
    close(own.matrix, torch.tensor(whole.matrix), 1e-5)


def test_a_tracked_head_sees_its_rows():
    model, data = llama().eval(), corpus(3)
    batch = Batches(data, model).load([0, 1, 2])
    task, shapes = LanguageModelTask(), []
    with alone(model):
        task.check(batch, model)
    layers = select_layers(model, ["lm_head"])
    Capture(model, layers)(
        lambda: task.compute_train_loss(batch, model), lambda seen: shapes.append(seen.g.shape)
    )
    assert shapes == [(*batch["input_ids"].shape, VOCABULARY)]


def test_a_head_that_learns_gets_its_gradient():
    model, data = gpt2().eval(), corpus(3)
    batch, task = Batches(data, model).load([0, 1, 2]), LanguageModelTask()
    with alone(model):
        task.check(batch, model)
    task.compute_train_loss(batch, model).backward()
    weight = model.lm_head.weight
    assert weight.grad is not None
    assert bool(weight.grad.abs().sum() > 0)
