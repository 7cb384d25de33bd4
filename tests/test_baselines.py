"""Methods to compare with: each against its definition, from per-sample gradients and by hand."""

import math

import numpy as np
import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, weight_gradient
from torch import nn

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.errors import ModelError, StoreError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages.factors import Factors
from ekfac_fast.store.files import load_tensors
from ekfac_fast.validation import baselines
from ekfac_fast.validation.ablations import (
    diagonal_factors,
    kfac_factors,
    shampoo_factors,
)

LAYERS = ["*.mlp.c_fc", "*.attn.c_proj"]


def flat_gradients(model, examples, measure, names):
    """[n,D]"""
    rows = []
    for index, example in enumerate(examples):
        loss = measure(batch_of(example | {"id": index}), model)
        rows.append(torch.cat([weight_gradient(model, n, loss).flatten() for n in names]).detach())
    return torch.stack(rows)


def test_dot_and_cosine_of_gradients():
    model, data, questions, task = gpt2(torch.float64), corpus(), asked(), LanguageModelTask()
    names = [x.name for x in select_layers(model, LAYERS)]
    a = flat_gradients(model, questions, task.compute_measurement, names)
    b = flat_gradients(model, data, task.compute_train_loss, names)
    more = {"layers": LAYERS, "batch_tokens": 24}
    close(baselines.gradient_dot(model, questions, data, **more), a @ b.T, 1e-10)
    cosine = baselines.gradient_dot(model, questions, data, cosine=True, **more)
    unit = a / a.norm(dim=1, keepdim=True) @ (b / b.norm(dim=1, keepdim=True)).T
    close(cosine, unit, 1e-10)
    assert abs(baselines.gradient_dot(model, data[:1], data, cosine=True)[0, 0] - 1) < 1e-6


def test_bm25_by_hand():
    texts = [[1, 1, 2], [2, 3], [4, 4, 4, 4, 4]]
    data = [{"input_ids": ids} for ids in texts]
    found = baselines.bm25([{"input_ids": [1, 2, 2]}], data)[0]

    def idf(n):
        return math.log((3 - n + 0.5) / (n + 0.5) + 1)

    def part(count, length):
        return count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / (10 / 3)))

    expected = [idf(1) * part(2, 3) + 2 * idf(2) * part(1, 3), 2 * idf(2) * part(1, 2), 0]
    assert np.allclose(found, expected)
    # Neither saturation nor length: every count of every token, by its rarity.
    plain = baselines.bm25([{"input_ids": [1]}], data, k1=1e9, b=0)[0]
    assert np.allclose(plain, [2 * idf(1), 0, 0])


def test_tfidf_is_that_of_the_candidates():
    data, questions = corpus(), asked()
    found = baselines.tfidf(questions, data)
    ids = questions[1]["input_ids"]
    counts = {t: sum(t in x["input_ids"] for x in data) for t in ids}
    idf = {t: math.log((len(data) - n + 0.5) / (n + 0.5) + 1) for t, n in counts.items()}
    expected = [sum(idf[t] for t in ids if t in x["input_ids"]) for x in data]
    assert np.allclose(found[1], expected)


def test_representations_leave_padding_out():
    model, data = gpt2().eval(), corpus()
    found = baselines.representation(model, data[:3], data)
    means = []
    for x in data:
        out = model(torch.tensor([x["input_ids"]]), output_hidden_states=True)
        means.append(out.hidden_states[-1][0].mean(0).double())
    expected = torch.cosine_similarity(torch.stack(means[:3])[:, None], torch.stack(means), dim=2)
    close(found, expected.detach(), 1e-5)
    with pytest.raises(ModelError, match="Plain returns no hidden states"):
        baselines.representation(Plain(), data[:1], data)


class Plain(nn.Module):
    """Takes what it is given and returns nothing of use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids, attention_mask, output_hidden_states):
        return input_ids


def test_chance_is_drawn_from_its_seed():
    assert np.array_equal(baselines.chance(2, 5, 1), baselines.chance(2, 5, 1))
    assert not np.array_equal(baselines.chance(2, 5, 1), baselines.chance(2, 5, 2))


def test_kfac_has_products_of_eigenvalues_in_the_units_of_ekfac(tmp_path):
    model, data = gpt2(), corpus()
    factors = fit(model, data, out=tmp_path / "f")
    kfac = kfac_factors(factors, tmp_path / "k")
    A, S = (
        load_tensors(tmp_path / "f" / f"{side}_covariance.safetensors")
        for side in ("activation", "gradient")
    )
    for name, own in kfac.items():
        a, g = A[name].double() / factors.tokens, S[name].double() / factors.tokens
        basis = own.Qg.double() @ own.lam.double()
        # kron(S, A) by its eigenvectors: Qg lam Qa^T of a matrix of ones' rotation.
        X = torch.randn(own.lam.shape, dtype=torch.float64)
        rotated = own.Qg.double().T @ X @ own.Qa.double() * own.lam.double()
        found = own.Qg.double() @ rotated @ own.Qa.double().T
        close(found, g @ X @ a * factors.tokens / factors.sequences, 1e-4)
        assert basis.isfinite().all()
        # Independent tokens would make both the same on average: here within a few times.
        assert 0.2 < (own.lam.mean() / factors[name].lam.mean()) < 5
    queries = prepare_queries(model, kfac, asked())
    scores = score(model, queries, data, out=tmp_path / "s")
    assert np.isfinite(scores.matrix).all()
    assert Factors(tmp_path / "k").identity == kfac_factors(factors, tmp_path / "k").identity
    assert kfac.identity != factors.identity
    for path in (tmp_path / "f").glob("manifest.json"):
        path.unlink()
    with pytest.raises(StoreError, match="not by this version of fit"):
        kfac_factors(Factors(tmp_path / "f"), tmp_path / "k2")


def test_diagonal_divides_by_mean_squares_of_gradients(tmp_path):
    model, data, questions, task = gpt2(torch.float64), corpus(), asked(), LanguageModelTask()
    names = [x.name for x in select_layers(model, LAYERS)]
    found = diagonal_factors(model, data, out=tmp_path / "d", layers=LAYERS, batch_tokens=24)

    def sampled(batch, model):
        return task.compute_train_loss(batch, model, sample=True)

    squares = flat_gradients(model, data, sampled, names).square().mean(0)
    close(torch.cat([found[n].lam.flatten() for n in names]), squares, 1e-10)
    queries = prepare_queries(model, found, questions, rank=None, damping=0.01)
    scores = score(model, queries, data, out=tmp_path / "s")
    a = flat_gradients(model, questions, task.compute_measurement, names)
    b = flat_gradients(model, data, task.compute_train_loss, names)
    close(scores.matrix, (a / (squares + 0.01)) @ b.T, 1e-10)
    again = diagonal_factors(model, data, out=tmp_path / "d", layers=LAYERS, batch_tokens=24)
    assert again.identity == found.identity


def sampled_gradients(model, data, layers, draw):
    """By layer name: [N,O,J] of the loss with a draw of labels."""
    task, rows = LanguageModelTask(), {x.name: [] for x in layers}
    for index, example in enumerate(data):
        batch = batch_of(example | {"id": index})
        for name, found in rows.items():
            loss = task.sampled_losses(batch, model, [draw])[0]
            found.append(weight_gradient(model, name, loss).detach())
    return {name: torch.stack(found) for name, found in rows.items()}


def check_corrected(factors, gradients):
    """Orthonormal eigenvectors, and eigenvalues that are mean squares in their basis."""
    for name, G in gradients.items():
        own = factors[name]
        for Q in (own.Qg, own.Qa):
            close(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype), 1e-12)
        close(own.lam, (own.Qg.T @ G @ own.Qa).square().mean(0), 1e-10)


def test_shampoo_turns_into_the_axes_of_sequences_gradients(tmp_path):
    model, data = gpt2(torch.float64), corpus()
    layers = select_layers(model, LAYERS)
    found = shampoo_factors(model, data, out=tmp_path / "s", layers=LAYERS, batch_tokens=24)
    check_corrected(found, sampled_gradients(model, data, layers, 0))
    for name, G in sampled_gradients(model, data, layers, 1).items():
        own = found[name]
        for Q, products in ((own.Qg, G @ G.mT), (own.Qa, G.mT @ G)):
            turned = Q.T @ products.sum(0) @ Q
            close(turned, turned.diagonal().diag(), 1e-10)
    again = shampoo_factors(model, data, out=tmp_path / "t", layers=LAYERS, batch_tokens=1000)
    close(again[name].lam, found[name].lam, 1e-6)
