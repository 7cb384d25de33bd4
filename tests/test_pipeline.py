"""The whole pipeline against dense EK-FAC, built from per-sample autograd gradients in fp64."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from dense_ekfac import (
    VOCABULARY,
    asked,
    close,
    corpus,
    dense_ekfac,
    gpt2,
    llama,
    weight_gradient,
)
from torch import nn

from ekfac_fast.errors import ArgumentError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.stages.candidates import top_candidates
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.preparation import prepare_queries
from ekfac_fast.stages.queries import Queries
from ekfac_fast.stages.scan import score, self_scores


# Llama's norms compute in fp32 whatever the model is.
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (gpt2, torch.float32, 1e-4),
        (llama, torch.float32, 1e-4),
        (gpt2, torch.float64, 1e-9),
        (llama, torch.float64, 1e-6),
    ],
)
def test_scores_are_dense_ekfac(make, dtype, tolerance, tmp_path):
    data, queries = corpus(), asked()
    model = make(dtype)
    names = [layer.name for layer in select_layers(model)]
    expected, own, lam = dense_ekfac(make(), names, data, queries)
    factors = fit(model, data, out=tmp_path / "factors", batch_tokens=64)
    assert [layer.name for layer in factors.layers(model)] == names
    for name in names:
        close(factors[name].lam.sum(), lam[name].sum(), tolerance)
    full = score(
        model, prepare_queries(model, factors, queries, rank=None), data, out=tmp_path / "full",
        per_token=True, batch_tokens=64,
    )  # fmt: skip
    close(full.matrix, expected, tolerance)
    # Rank min(O, J) is exact, through either contraction.
    ranked = prepare_queries(model, factors, queries, rank=16)
    close(score(model, ranked, data, out=tmp_path / "rank").matrix, expected, tolerance)
    close(self_scores(model, factors, data, out=tmp_path / "self").matrix[0], own, tolerance)
    for q in range(len(queries)):
        lowest = full.details(q, lowest=True)
        assert [(d.index, d.score) for d in lowest] == full.top(q, len(lowest), lowest=True) != []
        for detail in [*full.details(q), *lowest]:
            assert detail.score == full.matrix[q, detail.index]
            # The parts may cancel: rounding goes with their size, not with the sum's.
            slack = 1e-6 * np.abs(detail.per_layer_token).sum()
            assert abs(detail.per_token.sum() - detail.score) < slack
            assert abs(detail.per_layer.sum() - detail.score) < slack


def test_absolute_damping(tmp_path):
    data, queries, model = corpus(), asked(), gpt2(torch.float64)
    names = [layer.name for layer in select_layers(model)]
    expected, _, _ = dense_ekfac(gpt2(), names, data, queries, damping=0.3)
    factors = fit(model, data, out=tmp_path / "f")
    prepared = prepare_queries(model, factors, queries, rank=None, damping=0.3)
    close(score(model, prepared, data, out=tmp_path / "s").matrix, expected, 1e-9)


def test_a_smaller_rank_is_close_and_tells_its_energy(tmp_path):
    data, queries, model = corpus(), asked(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    full = score(
        model, prepare_queries(model, factors, queries, rank=None), data, out=tmp_path / "s"
    )
    errors = []
    for rank in (2, 6, 12):
        prepared = prepare_queries(model, factors, queries, rank=rank)
        got = score(model, prepared, data, out=tmp_path / f"s{rank}").matrix
        errors.append(np.abs(got - full.matrix).max())
        P = prepare_queries(model, factors, queries, rank=None).layers[0].P
        kept = prepared.preconditioned(prepared.layers[0].layer.name).square().sum((1, 2))
        close(prepared.layers[0].energy, kept / P.square().sum((1, 2)), 1e-3)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_batches_order_and_padding_do_not_matter(make, tmp_path):
    data, queries, model = corpus(), asked(), make()
    first = fit(model, data, out=tmp_path / "a", batch_tokens=32)
    backwards = [data[i] | {"id": i} for i in reversed(range(len(data)))]
    padded = [
        {
            "input_ids": [0] * 3 + e["input_ids"],
            "attention_mask": [0] * 3 + [1] * len(e["input_ids"]),
            "labels": [-100] * 3 + e["input_ids"],
            "id": e["id"],
        }
        for e in backwards
    ]
    second = fit(model, padded, out=tmp_path / "b", batch_tokens=1000)
    for name in first:
        close(second[name].lam.sum(), first[name].lam.sum(), 1e-5)
    # Eigenvectors are free in sign and within equal eigenvalues; scores are not.
    scores = [
        score(model, prepare_queries(model, f, queries, rank=None), data, out=tmp_path / f"s{i}",
              batch_tokens=tokens).matrix
        for i, (f, tokens) in enumerate(((first, 40), (second, 500)))
    ]  # fmt: skip
    close(scores[1], torch.tensor(np.array(scores[0])), 1e-4)


def test_top_k_is_the_matrix_and_candidates_are_the_only_ones(tmp_path):
    data, queries, model = corpus(30), asked(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    prepared = prepare_queries(model, factors, queries, rank=None)
    full = score(model, prepared, data, out=tmp_path / "full", batch_tokens=64)
    heap = score(model, prepared, data, out=tmp_path / "heap", batch_tokens=64, top_k=4)
    assert [heap.top(q, 4) for q in range(3)] == [full.top(q, 4) for q in range(3)]
    with pytest.raises(ValueError, match="top 4"):
        _ = heap.matrix
    some = score(model, prepared, data, out=tmp_path / "some", candidates=[[1, 5], [5], [7, 9, 11]])
    assert (~np.isnan(some.matrix)).sum(1).tolist() == [2, 1, 3]
    close(some.matrix[2, [7, 9, 11]], torch.tensor(np.array(full.matrix[2, [7, 9, 11]])), 1e-5)
    filtered = score(
        model, prepared, data, out=tmp_path / "tfidf", candidates="tfidf:6", per_token=True
    )
    assert (~np.isnan(filtered.matrix)).sum(1).tolist() == [6, 6, 6]
    best = top_candidates([ids for ids, _ in prepared.examples], data, 6, VOCABULARY)[0]
    for q in range(3):
        details = filtered.details(q)
        assert [best[q][d.candidate_rank - 1] for d in details] == [d.index for d in details]


def test_queries_survive_the_disk(tmp_path):
    data, model = corpus(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    for rank in (None, 4):
        prepared = prepare_queries(model, factors, asked(), rank=rank)
        prepared.save(tmp_path)
        loaded = Queries.load(tmp_path)
        name = loaded.layers[0].layer.name
        assert torch.equal(loaded.preconditioned(name), prepared.preconditioned(name))
        assert loaded.damping == prepared.damping
        assert torch.equal(loaded.examples[1][1], prepared.examples[1][1])
    with pytest.raises(ArgumentError, match=r"layer is .nowhere., expected one of .*mlp"):
        prepared.preconditioned("nowhere")


def test_questions_that_scores_cannot_answer(tmp_path):
    data, model = corpus(4), gpt2()
    prepared = prepare_queries(model, fit(model, data, out=tmp_path / "f"), asked()[:2])
    scores = score(model, prepared, data, out=tmp_path / "s")
    assert scores.top(1, 0) == []
    assert len(scores.top(1, 99)) == 4
    for wrong in (lambda: scores.top(2, 1), lambda: scores.top(-1, 1), lambda: scores.details(2)):
        with pytest.raises(
            ArgumentError, match=r"query is .*, expected a whole number from 0 to 1"
        ):
            wrong()
    with pytest.raises(ArgumentError, match="k is -1"):
        scores.top(0, -1)


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Twenty times the sequences: the same peak, in a process of its own."""
    code = """
import re, sys
sys.path.insert(0, {tests!r})
from dense_ekfac import asked, corpus, gpt2
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.preparation import prepare_queries
from ekfac_fast.stages.scan import score
model = gpt2()
few = corpus(20)
factors = fit(model, few, out={out!r} + "/f")
prepared = prepare_queries(model, factors, asked(), rank=4)
class Many:
    def __len__(self): return {n}
    def __getitem__(self, i): return few[i % 20]
score(model, prepared, few, out={out!r} + "/warm", batch_tokens=256, top_k=3)
def peak():
    # Not ru_maxrss: that of a child starts at its parent's size.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
score(model, prepared, Many(), out={out!r} + "/s", batch_tokens=256, top_k=3)
print(peak() - before)
"""
    grown = {}
    for n in (100, 2000):
        out = tmp_path / str(n)
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c",
             code.format(tests=os.path.dirname(__file__), out=str(out), n=n)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown[n] = int(done.stdout)
    assert grown[2000] - grown[100] < 16 * 1024  # KiB


def test_time_is_recorded(tmp_path):
    data, model = corpus(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    start = time.perf_counter()
    scores = score(model, prepare_queries(model, factors, asked()), data, out=tmp_path / "s")
    assert 0 < scores.seconds < time.perf_counter() - start


class Regression:
    """kronfluence's method names, tuples through torch's default collate, no attention mask."""

    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return (model(x) - y).square().sum()

    def compute_measurement(self, batch, model):
        x, _ = batch
        return model(x).sum()

    def get_influence_tracked_modules(self):
        return ["0", "2"]

    def get_attention_mask(self, batch):
        return None


def test_a_regression_task_as_written_for_kronfluence(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    data = [(x, x.sum(-1, keepdim=True)) for x in torch.randn(20, 3, dtype=torch.float64)]
    asked, task, names = data[:2], Regression(), ["0", "2"]
    one = [tuple(part[None] for part in example) for example in data]

    def gradients(batch, measure):
        return {n: weight_gradient(model, n, measure(batch, model)) for n in names}

    train = [gradients(batch, task.compute_train_loss) for batch in one]
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for n, source in (("0", lambda x: x), ("2", lambda x: model[1](model[0](x)))):
        inputs = torch.cat([torch.cat([source(x), x.new_ones(1, 1)], 1) for x, _ in one]).detach()
        outputs = torch.cat([g[n][:, -1:].T for g in train])  # the bias's gradient is g itself
        Qa, Qg = (torch.linalg.eigh(x.T @ x / len(one))[1] for x in (inputs, outputs))
        rotated = torch.stack([Qg.T @ g[n] @ Qa for g in train])
        lam = rotated.square().mean(0)
        for q, batch in enumerate(one[:2]):
            P = (Qg.T @ gradients(batch, task.compute_measurement)[n] @ Qa) / (
                lam + 0.1 * lam.mean()
            )
            expected[q] += (P * rotated).sum((1, 2))
    factors = fit(model, data, out=tmp_path / "f", task=task, batch_size=6)
    prepared = prepare_queries(model, factors, asked, task=task, rank=None)
    close(score(model, prepared, data, out=tmp_path / "s", task=task).matrix, expected, 1e-9)
