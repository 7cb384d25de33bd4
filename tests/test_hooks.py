"""A pass as a stream of layer batches: right gradients, right labels, the model left alone."""

import torch
from dense_ekfac import batch_of, close, corpus, gpt2, llama
from torch import nn
from torch.nn import functional as F

from ekfac_fast.model.capture import Capture
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.tasks import LanguageModelTask


def test_left_padding_gives_the_same_gradients():
    model = gpt2(torch.float64)
    task, layers = LanguageModelTask(), select_layers(gpt2())
    ids = torch.tensor(corpus(1)[0]["input_ids"])
    found = []
    for left in (0, 5):
        blank = torch.zeros(left, dtype=torch.int64)
        batch = {
            "input_ids": torch.cat([blank, ids])[None],
            "attention_mask": torch.cat([blank, torch.ones_like(ids)])[None],
            "labels": torch.cat([blank - 100, ids])[None],
            "index": torch.tensor([7]),
        }
        sums = {}
        for sample in (False, True):
            Capture(model, layers)(
                lambda b=batch, s=sample: task.compute_train_loss(b, model, sample=s),
                lambda seen, s=sample, to=sums: to.update(
                    {(seen.layer.name, s): seen.g.mT @ seen.a}
                ),
            )
        found.append(sums)
    for key, value in found[0].items():
        close(found[1][key], value, 1e-12)


def test_shared_inputs_are_computed_once(tmp_path):
    model, data = llama(), corpus(4)
    readers = {}
    Capture(model, select_layers(model))(
        lambda: LanguageModelTask().compute_train_loss(batch_of(data[0] | {"id": 0}), model),
        lambda seen: readers.update({seen.layer.name: (seen.shared, seen.readers)}),
    )
    gate, up, down = (f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down"))
    assert readers[gate] == readers[up] == (gate, 2)
    assert readers[down] == (down, 1)


def test_an_input_changed_in_place_is_still_seen_as_it_was():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x)
            y = self.second(h)
            h.mul_(0)
            return y

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    seen = {}
    Capture(model, select_layers(model, "second"))(
        lambda: model(x).square().sum(), lambda b: seen.update({b.layer.name: b.g.mT @ b.a})
    )
    expected = torch.func.vmap(
        torch.func.grad(
            lambda w, h: F.linear(h, w, model.second.bias).square().sum()
        ), in_dims=(None, 0)
    )(model.second.weight.detach(), model.first(x).detach())  # fmt: skip
    close(seen["second"], expected, 1e-12)


def test_a_module_used_twice_sums_its_uses():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    seen = {}
    Capture(model, select_layers(model, "layer"))(
        lambda: model(x).square().sum(), lambda b: seen.update({b.layer.name: b.g.mT @ b.a})
    )
    weight, bias = (p.detach() for p in model.layer.parameters())

    def loss(w, row):
        return F.linear(torch.tanh(F.linear(row, w, bias)), w, bias).square().sum()

    close(seen["layer"], torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x), 1e-12)


def test_nothing_of_the_model_changes():
    model = gpt2().train()
    model.transformer.wte.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    Capture(model, select_layers(model))(
        lambda: LanguageModelTask().compute_train_loss(batch_of(corpus(1)[0] | {"id": 0}), model),
        lambda _: None,
    )
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    for name, p in model.named_parameters():
        required, value = before[name]
        assert p.requires_grad == required
        assert p.grad is None
        assert torch.equal(p, value)
