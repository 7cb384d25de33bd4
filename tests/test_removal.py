"""Removal and tail patch: where the truth is planted, what is refused, what is left as it was."""

import numpy as np
import pytest
import torch
from dense_ekfac import asked, corpus, gpt2
from retrainings import DATA, LINEAR, QUESTIONS, N, Q, measured, trained

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.data.batches import Batches
from ekfac_fast.errors import ArgumentError, DataError, NotFiniteError
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.validation import RetrainingBank, removals, tail_patch
from ekfac_fast.validation.measure import measurements
from ekfac_fast.validation.one_step import step_check, stepped


def removed(folder, scores, train=trained, **settings):
    more = {"measure": measured, "shares": (0.1, 0.25), "draws": 30} | settings
    return removals(folder, train, DATA, QUESTIONS, scores, **more)


def test_the_rise_is_what_the_removed_gave(tmp_path):
    found = removed(tmp_path, {"true": LINEAR, "minus": -LINEAR})
    assert [(x.name, x.count) for x in found] == [
        ("true", 2), ("true", 6), ("minus", 2), ("minus", 6),
    ]  # fmt: skip
    ordered = np.sort(LINEAR, axis=1)[:, ::-1]
    for one in found[:2]:
        assert np.allclose(one.top, ordered[:, : one.count].sum(1) / N)
        assert np.allclose(one.lowest, ordered[:, -one.count :].sum(1) / N)
        assert (one.lowest < one.random).all()
        assert (one.random < one.top).all()
        expected = one.count * LINEAR.mean(1) / N
        spread = LINEAR.std(1) / N * np.sqrt(one.count / 30)
        assert (abs(one.random - expected) < 3 * spread).all()
    assert np.allclose(found[2].top, found[0].lowest)
    assert f"without the top 2 {found[0].top.mean():+.3f}, without as many" in found[0].line


def test_a_method_more_trains_nothing_again(tmp_path):
    removed(tmp_path, {"true": LINEAR})
    seen = []

    def counted(indices, seed):
        seen.append(len(indices))
        return trained(indices, seed)

    removed(tmp_path, {"true": LINEAR, "other": -LINEAR}, counted)
    assert sorted(seen) == sorted([N - 2] * 2 * Q + [N - 6] * 2 * Q)
    assert len(RetrainingBank(tmp_path / "controls")) == 1 + 2 * 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scores": {"controls": LINEAR}}, "the name of scores is 'controls'"),
        ({"scores": {"../a": LINEAR}}, r"the name of scores is '\.\./a'"),
        ({"scores": LINEAR}, "scores is array.*expected a mapping"),
        ({"shares": (0.1, 1.5)}, "shares is 1.5"),
        ({"draws": 0}, "draws is 0"),
        ({"scores": {"a": LINEAR[:, 1:]}}, r"a: scores are \[3, 23\], expected \[3, 24\]"),
    ],
)
def test_refusals(settings, message, tmp_path):
    scores = settings.pop("scores", {"a": LINEAR})
    with pytest.raises((ArgumentError, DataError), match=f"(?s){message}"):
        removed(tmp_path, scores, **settings)


def test_tail_patch_teaches_what_is_planted_and_leaves_the_model(tmp_path):
    """Of every query a copy stands in the data: a few steps on it raise its probability."""
    model, questions = gpt2().train(), asked()
    data = corpus() + [{"input_ids": x["input_ids"]} for x in questions]
    scores = np.zeros((3, len(data)))
    scores[np.arange(3), 12 + np.arange(3)] = 1
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    before = measurements(model, questions)
    found = tail_patch(model, questions, data, {"copies": scores}, k=1, steps=3, size=0.05)
    assert list(found) == ["copies", "random", "BM25"]
    assert (found["copies"] > 0.05).all()
    assert (found["copies"] > found["random"] + 0.02).all()
    # BM25 finds the copies as well.
    assert np.allclose(found["BM25"], found["copies"])
    assert model.training
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert torch.equal(measurements(model, questions), before)
    assert list(tail_patch(model, questions, data, {"a": scores}, controls=False, k=2)) == ["a"]


def test_patches_and_steps_are_of_the_model_as_it_is_asked(tmp_path):
    """Neither dropout nor the mode that parts of it are in changes them, and neither is changed."""
    model, questions, data = gpt2(), asked(), corpus()
    queries = prepare_queries(model.eval(), fit(model, data, out=tmp_path / "f"), questions)
    scores = score(model, queries, data, out=tmp_path / "s")
    how = {"controls": False, "k": 1}
    expected = tail_patch(model, questions, data, {"a": scores.matrix}, **how)["a"]
    steps = step_check(model, queries, scores, data)
    model.train().transformer.ln_f.eval()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.5
    modes = [m.training for m in model.modules()]
    found = tail_patch(model, questions, data, {"a": scores.matrix}, **how)["a"]
    assert np.array_equal(found, expected)
    assert step_check(model, queries, scores, data) == steps
    assert [m.training for m in model.modules()] == modes


def test_a_small_step_changes_a_measurement_by_its_gradient():
    """d measurement = -size <grad f, grad L> / ||grad L||."""
    model, task = gpt2(torch.float64).eval(), LanguageModelTask()
    questions, data = asked(1), corpus()
    weights = list(model.parameters())
    batch, ask = Batches(data, model).load([3]), Batches(questions, model).load([0])
    g = torch.autograd.grad(task.compute_train_loss(batch, model), weights)
    f = torch.autograd.grad(task.compute_measurement(ask, model), weights)
    length = sum((x * x).sum() for x in g).sqrt()
    expected = -1e-5 * sum((a * b).sum() for a, b in zip(f, g, strict=True)) / length
    before = measurements(model, questions)
    with stepped(weights, lambda: task.compute_train_loss(batch, model), size=1e-5):
        change = measurements(model, questions) - before
    assert change.item() == pytest.approx(expected.item(), rel=1e-3)


def test_refusals_of_patches():
    model, data, questions = gpt2(), corpus(), asked()
    scores = np.zeros((3, 12))
    with pytest.raises(ArgumentError, match="k is 13, but the data set has 12"):
        tail_patch(model, questions, data, {"a": scores}, k=13)
    with pytest.raises(DataError, match=r"a: scores are \[3, 11\]"):
        tail_patch(model, questions, data, {"a": scores[:, 1:]})
    for w in model.parameters():
        w.requires_grad_(False)
    with pytest.raises(ArgumentError, match="no parameter of the model requires a gradient"):
        tail_patch(model, questions, data, {"a": scores})


def test_a_diverging_step_is_said(monkeypatch):
    model, data, questions = gpt2(), corpus(), asked()
    kept = model.lm_head.weight.clone()
    with pytest.raises(NotFiniteError, match="a: after 3 steps the measurement of query 0 is"):
        tail_patch(model, questions, data, {"a": np.zeros((3, 12))}, size=float("1e30"))
    assert torch.equal(model.lm_head.weight, kept)
