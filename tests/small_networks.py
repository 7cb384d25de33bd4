"""Harness: small language models whose body is a test's own; gradients of every sequence, by us and
by autograd on the parameters.
"""

from types import SimpleNamespace

import torch
from dense_ekfac import weight_gradient
from torch import nn

from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages.consumer import Consumer
from ekfac_fast.stages.run import Run, Stage

WORDS, WIDTH = 97, 16


class Net(nn.Module):
    """Embedding, `body(net, x)`, head; layers a and b, and aux, which a body may use."""

    def __init__(self, body, bias=(True, True)):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.emb, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, bias=has) for has in bias)
        self.aux = nn.Linear(WIDTH, 4)
        self.double().eval()

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.body(self, self.emb(input_ids))))


def sequences(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, WORDS, (n,), generator=generator)} for n in lengths]


class Collected(Consumer):
    """[O,J] of every example in every layer, from what a pass hands out."""

    def __init__(self):
        self.found = {}

    def add(self, seen, batch):
        a = seen.a
        if seen.layer.bias:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], -1)
        for b, index in enumerate(batch.indices):
            self.found[seen.layer.name, index] = seen.g[b].T @ a[b]


def captured(model, data, names, shared=False, **arguments):
    layers = select_layers(model, names, shared=shared)
    run, collected = Run(model, data, arguments), Collected()
    run.each(Stage.SCAN, layers, run.batches.divided(), collected)
    return collected.found


def expected(model, data, names, task=None):
    """By autograd on the parameters, one sequence at a time, without padding."""
    task, found = task or LanguageModelTask(), {}
    for index, record in enumerate(data):
        batch = {name: torch.as_tensor(x)[None] for name, x in record.items()}
        batch.setdefault("labels", batch["input_ids"])
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        batch["index"] = torch.tensor([index])
        loss = task.compute_train_loss(batch, model)
        for name in names:
            found[name, index] = weight_gradient(model, name, loss).detach()
    return found


def assert_equal(got, want, tolerance=1e-12):
    assert got.keys() == want.keys()
    for key, x in want.items():
        error = (got[key] - x).abs().max() / x.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{key}: relative error {error:.1e}"
