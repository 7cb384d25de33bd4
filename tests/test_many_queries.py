"""Thousands of queries at once: memory is that of what is kept of them, and of nothing dense."""

import re
import sys
from pathlib import Path

import pytest
import torch
from dense_ekfac import asked, close, corpus, gpt2
from plain_tasks import Squares
from torch import nn

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.model.layers import select_layers
from ekfac_fast.stages import detail
from ekfac_fast.stages.queries import LayerQueries, Queries

Q, K = 2000, 2


def peak():
    """Megabytes that this process has had at most since it was last asked."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_scan_takes_the_factors_of_its_queries_and_little_more(tmp_path):
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
    layers = select_layers(model, "all")
    kept = tuple(
        LayerQueries(x, torch.randn(Q, x.O, K), torch.randn(Q, K, x.J), None, torch.ones(Q))
        for x in layers
    )
    queries = Queries(kept, K, (0.1,) * len(layers), torch.ones(Q), ())
    data = [(torch.randn(256), torch.randn(256)) for _ in range(8)]
    peak()
    before = peak()
    scores = score(model, queries, data, out=tmp_path, task=Squares(), batch_size=4)
    taken = peak() - before
    factors = sum(x.L.nbytes + x.R.nbytes for x in kept) / 2**20
    assert factors < 50
    assert taken < 3 * factors + 50, f"{taken:.0f} MB for {factors:.0f} MB of factors"
    model.zero_grad()
    Squares().compute_train_loss([x[None] for x in data[3]], model).backward()
    some = slice(1990, 2000)
    exact = sum(
        torch.einsum("qok,qkj,oj->q", x.L[some], x.R[some],
                     torch.cat([module.weight.grad, module.bias.grad[:, None]], 1))
        for x, module in zip(kept, (model[0], model[2]), strict=True)
    )  # fmt: skip
    close(scores.matrix[some, 3], exact, 1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rank", [1, None])
def test_many_queries_are_prepared_in_batches(rank, tmp_path):
    model = gpt2().eval()
    factors = fit(model, corpus(8), out=tmp_path / "f")
    layer = "transformer.h.0.mlp.c_fc"
    peak()
    before = peak()
    prepared = prepare_queries(model, factors, asked(500), rank=rank)
    taken = peak() - before
    kept = sum(t.nbytes for x in prepared.layers for t in (x.L, x.R, x.P) if t is not None) / 2**20
    assert taken < 4 * kept + 40, f"{taken:.0f} MB for {kept:.0f} MB of queries"
    alone = prepare_queries(model, factors, asked(500)[400:401], rank=rank)
    close(prepared.preconditioned(layer)[400], alone.preconditioned(layer)[0], 1e-4)


def test_details_keep_the_pairs_that_are_asked_for(tmp_path, monkeypatch):
    """Not every query's scores of every sequence of a batch."""
    model, data, sizes = gpt2().eval(), corpus(60), []
    prepared = prepare_queries(model, fit(model, data, out=tmp_path / "f"), asked(20), rank=4)
    end = detail.Details.end

    def measured(self, batch):
        kept = sum(self.found[at].numel() for at in range(len(self.order)))
        sizes.append((kept, len(self.pairs)))
        end(self, batch)

    monkeypatch.setattr(detail.Details, "end", measured)
    scores = score(model, prepared, data, out=tmp_path / "s", per_token=True, top_k=2)
    assert sum(pairs for _, pairs in sizes) == 40
    longest = max(len(x["input_ids"]) for x in data)
    assert all(size <= pairs * len(scores.layers) * longest for size, pairs in sizes)
    for q in (0, 19):
        for found, (index, value) in zip(scores.details(q), scores.top(q, 2), strict=True):
            assert found.index == index
            close(found.per_layer_token.sum(), torch.tensor(value), 1e-4)
