"""Rows that are not whose their number makes them look: each refused, or right one by one."""

import numpy as np
import pytest
import torch
from dense_ekfac import close, corpus
from plain_tasks import Plain
from test_disguises import Unpadded, brute
from torch import nn
from torch.nn import functional as F

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.errors import ModelError

WIDTH, CLASSES = 8, 4


class Prompts(nn.Module):
    """An example against the prompts of all classes, which one layer reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prompts = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.key, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.own(x).tanh() @ self.key(self.prompts).tanh().T


class Patches(nn.Module):
    """Images of several sizes: the patches of all, one after the other; an image is its sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        rows = x.flatten(0, 1)[~(x == 0).all(-1).flatten()]
        whose = torch.arange(len(x), device=x.device).repeat_interleave((~(x == 0).all(-1)).sum(1))
        found = x.new_zeros(len(x), WIDTH)
        return self.last(found.index_add(0, whose, self.first(rows).tanh()))


class Sorted(Unpadded):
    """Sequences in the order of their lengths inside, and as they came outside."""

    def forward(self, input_ids, attention_mask=None):
        order = attention_mask.sum(1).argsort(stable=True)
        h = self.emb(input_ids[order])
        h = h + 0.1 * h.cumsum(1)
        logits = self.head(h + self.second(torch.relu(self.first(h))))[order.argsort()]
        return type("Output", (), {"logits": logits})


class Classes(Plain):
    """Cross-entropy of (input, class)."""

    def compute_train_loss(self, batch, model, sample=False):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def examples(sizes):
    """Of so many patches each, the rest of at most 6 zero; None: of no patches at all."""
    rng = np.random.default_rng(0)
    found = []
    for n in sizes:
        x = torch.tensor(rng.standard_normal((6, WIDTH)))
        if n is None:
            x = x[0]
        else:
            x[n:] = 0
        found.append((x, torch.tensor(int(rng.integers(CLASSES)))))
    return found


def products(model, data, folder, batch_size, layers):
    """<grad f, grad L_i>: scores times a damping above all curvature."""
    how = {"task": Classes(), "batch_size": batch_size}
    factors = fit(model, data, out=folder / "f", layers=layers, **how)
    queries = prepare_queries(model, factors, data[:3], rank=None, damping=1e10, **how)
    return 1e10 * np.array(score(model, queries, data, out=folder / "s", **how).matrix)


def brute_products(model, data, layers):
    weights = [p for n in layers for p in getattr(model, n).parameters()]

    def gradient(one):
        loss = Classes().compute_train_loss([x[None] for x in one], model)
        found = torch.autograd.grad(loss, weights)
        return torch.cat([x.flatten() for x in found])

    rows = torch.stack([gradient(x) for x in data])
    return (rows[:3] @ rows.T).numpy()


@pytest.mark.parametrize("size", [CLASSES, 2 * CLASSES])
def test_as_many_classes_as_examples(size, tmp_path):
    model, data, both = Prompts().double(), examples([None] * 2 * CLASSES), ["key", "own"]
    with pytest.raises(ModelError, match=r"layer key: .* batch_size=1\), so that every"):
        products(model, data, tmp_path, size, both)
    for name, layers, batch in (("own", ["own"], size), ("1", both, 1)):
        found = products(model, data, tmp_path / name, batch, layers)
        assert np.allclose(found, brute_products(model, data, layers), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [[4, 2, 6, 4, 4, 4], [4, 2, 5, 4, 4, 4], [2, 4, 6, 4, 4, 4]])
def test_images_of_several_sizes(sizes, tmp_path):
    """That their sum is as if all were alike tells nothing."""
    model, data, layers = Patches().double(), examples(sizes), ["first", "last"]
    with pytest.raises(ModelError, match=r"layer first: .*batch_size=1"):
        products(model, data, tmp_path, 3, layers)
    for name, batch, some in (("1", 1, data), ("alike", 3, examples([4] * 6))):
        found = products(model, some, tmp_path / name, batch, layers)
        assert np.allclose(found, brute_products(model, some, layers), rtol=1e-6, atol=1e-7)


def test_sequences_that_change_places_inside(tmp_path):
    model, data = Sorted().double(), corpus(6)
    for example in data:
        example["input_ids"] = [i % 61 for i in example["input_ids"]]
    layers = {"layers": ["first", "second"]}
    with pytest.raises(ModelError, match=r"layer first: .*no axis .*batch_tokens=1"):
        fit(model, data, out=tmp_path / "several", **layers)
    alone = layers | {"batch_tokens": 1}
    factors = fit(model, data, out=tmp_path / "f", **alone)
    queries = prepare_queries(model, factors, data[:2], rank=None, batch_tokens=1)
    found = score(model, queries, data, out=tmp_path / "s", batch_tokens=1)
    close(torch.from_numpy(np.array(found.matrix)), brute(model, queries, data), 1e-6)
