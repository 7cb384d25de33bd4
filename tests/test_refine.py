"""Refined queries: against dense damped Gauss-Newton solves; what stops, what is refused."""

import warnings
from itertools import pairwise

import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, weight_gradient
from dense_newton import (
    MADE,
    Classification,
    Regression,
    chosen,
    flat,
    gauss_newton,
    in_fp64,  # noqa: F401
    mlp,
)
from torch import nn

from ekfac_fast.curvature import solvers
from ekfac_fast.curvature.solvers import Outcome
from ekfac_fast.errors import ArgumentError, Notice, StoreError
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages import refine
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.preparation import prepare_queries
from ekfac_fast.stages.queries import Queries
from ekfac_fast.store.folder import Pace


def damped(model, task, data, layers, dampings):
    """H + damping, dense, [D,D]."""
    parts = [torch.full((x.O * x.J,), dampings[x.name], dtype=torch.float64) for x in layers]
    return gauss_newton(model, task, data, layers) + torch.cat(parts).diag()


def exact(model, task, data, questions, layers, dampings):
    """(H + damping)^-1 grad f, dense, [Q,D]."""
    rows = []
    for index, question in enumerate(questions):
        if isinstance(task, LanguageModelTask):
            batch = batch_of(question | {"id": index})
        else:
            batch = tuple(torch.as_tensor(part)[None] for part in question)
        f = task.compute_measurement(batch, model)
        rows.append(
            torch.cat([weight_gradient(model, x.name, f).flatten() for x in layers]).detach()
        )
    b = torch.stack(rows)
    return torch.linalg.solve(damped(model, task, data, layers, dampings), b.mT).mT, b


def found(prepared, layers):
    """[Q,D] of prepared queries."""
    return flat({x.name: prepared.preconditioned(x.name) for x in layers}, layers)


@pytest.mark.parametrize("name", ["GPT-2", "experts", "regression", "classification"])
def test_conjugate_gradients_end_in_the_dense_solution(name, in_fp64, tmp_path):  # noqa: F811
    model, task, data = MADE[name]()
    layers = chosen(model, name)
    factors = fit(model, data, out=tmp_path / "f", task=task, layers=[x.name for x in layers])
    questions = data[:2] if "ion" in name else [x | {"labels": x["input_ids"]} for x in data[:2]]
    more = {"task": task, "rank": None, "batch_tokens": 9, "batch_size": 5}
    more["damping"] = 0.5 if name == "GPT-2" else 0.02
    plain = prepare_queries(model, factors, questions, **more)
    prepared = prepare_queries(
        model, factors, questions, refine="cg:300", dataset=data, out=tmp_path / "q", **more
    )
    dampings = dict(zip((x.name for x in layers), plain.damping, strict=True))
    expected, _ = exact(model, task, data, questions, layers, dampings)
    close(found(prepared, layers), expected, 1e-8)
    assert (prepared.residual < 1e-12).all()
    assert (prepared.refinement.before > 1e-3).all()
    assert (prepared.refinement.outcomes == Outcome.CONVERGED).all()
    assert plain.residual is None


def test_every_iteration_is_nearer_and_the_residual_is_the_true_one(tmp_path):
    model, task, data = MADE["regression"]()
    layers = chosen(model, "")
    factors = fit(model, data, out=tmp_path / "f", task=task)
    dampings = factors.dampings(layers, None)
    expected, b = exact(model, task, data, data[:3], layers, dampings)
    H = damped(model, task, data, layers, dampings)
    before, errors = None, []
    for steps in (1, 2, 4, 8):
        prepared = prepare_queries(
            model, factors, data[:3], task=task, rank=None, refine=f"cg:{steps}", dataset=data
        )
        x = found(prepared, layers)
        close(prepared.residual, (b - x @ H).norm(dim=1) / b.norm(dim=1), 1e-9)
        before = before if before is not None else prepared.refinement.before
        assert torch.equal(prepared.refinement.before, before)
        error = x - expected
        errors.append((error @ H * error).sum(1))
    assert all((b < a).all() for a, b in pairwise(errors))


def test_on_a_linear_model_of_all_label_draws_ekfac_is_exact(tmp_path):
    """Every sign of every position's deviation once: corrected eigenvalues are H's own, in its
    units, and there is nothing left to refine.
    """
    model, task = nn.Sequential(nn.Linear(3, 1)).double(), Regression()
    inputs = torch.randn(7, 2, 3, dtype=torch.float64)
    signs = [torch.tensor([[a], [b]]).double() for a in (1, -1) for b in (1, -1)]
    data = [(x, x[:, :1], sign) for x in inputs for sign in signs]
    factors = fit(model, data, out=tmp_path / "f", task=task)
    prepared = prepare_queries(
        model, factors, data[:2], task=task, rank=None, refine="cg:1", dataset=data
    )
    assert (prepared.refinement.before < 1e-12).all()


def test_rank_is_taken_of_the_refined(tmp_path):
    model, data = gpt2(), corpus()
    factors = fit(model, data, out=tmp_path / "f")
    more = {"refine": "cg:3", "dataset": data}
    whole = prepare_queries(model, factors, asked(), rank=None, **more)
    ranked = prepare_queries(model, factors, asked(), rank=16, **more)
    for layer in whole.layers:
        close(ranked.preconditioned(layer.layer.name), layer.P, 1e-4)
    assert not torch.allclose(
        whole.layers[0].P, prepare_queries(model, factors, asked(), rank=None).layers[0].P
    )


def test_groups_of_queries_and_batches_change_rounding_alone(tmp_path, monkeypatch):
    model, data = gpt2(torch.float64), corpus()
    factors = fit(model, data, out=tmp_path / "f")
    more = {"rank": None, "refine": "cg:3", "dataset": data, "refine_examples": 7}
    first = prepare_queries(model, factors, asked(5), **more)
    monkeypatch.setattr(refine, "VECTOR_BYTES", 0)
    second = prepare_queries(model, factors, asked(5), batch_tokens=24, **more)
    for a, b in zip(first.layers, second.layers, strict=True):
        close(b.P, a.P, 1e-9)
    close(second.residual, first.residual, 1e-9)
    assert len(first.facts["refine"]["examples"]) == 7


@pytest.mark.parametrize("method", ["lissa:200", "astra:100"])
def test_descents_come_nearer(method, tmp_path, monkeypatch):
    model, task, data = MADE["regression"]()
    layers = chosen(model, "")
    factors = fit(model, data, out=tmp_path / "f", task=task)
    expected, _ = exact(model, task, data, data[:2], layers, factors.dampings(layers, 0.5))
    more = {"task": task, "rank": None, "damping": 0.5}
    plain = found(prepare_queries(model, factors, data[:2], **more), layers)
    prepared = prepare_queries(model, factors, data[:2], refine=method, dataset=data, **more)
    error = (found(prepared, layers) - expected).norm()
    # All examples are in every step: to the solution. A few: its neighbourhood.
    assert error < 0.01 * (plain - expected).norm()
    monkeypatch.setattr(refine, "MINIBATCH", 6)
    some = prepare_queries(model, factors, data[:2], refine=method, dataset=data, **more)
    assert error < (found(some, layers) - expected).norm() < (plain - expected).norm()


def test_minibatches_are_every_example_once_an_epoch(tmp_path):
    model, task, data = MADE["regression"](40)
    factors = fit(model, data, out=tmp_path / "f", task=task)
    layers = chosen(model, "")
    job = refine.Refining(
        model, factors, layers, factors.dampings(layers, None), data, "astra", None, 3,
        {"task": task},
    )  # fmt: skip
    steps = [job.minibatch(step) for step in range(4)]
    assert len({*steps[0], *steps[1]}) == len({*steps[2], *steps[3]}) == 32
    assert steps[0] != steps[2]
    assert job.steps == 300


def test_queries_and_their_residuals_survive_the_disk(tmp_path):
    model, data = gpt2(), corpus()
    factors = fit(model, data, out=tmp_path / "f")
    prepared = prepare_queries(model, factors, asked(), refine="cg:2", dataset=data)
    prepared.save(tmp_path)
    loaded = Queries.load(tmp_path)
    assert torch.equal(loaded.residual, prepared.residual)
    assert loaded.refinement.told(1) == prepared.refinement.told(1)
    assert prepared.refinement.told(1).endswith(", 2 iterations")
    assert loaded.facts["refine"] == prepared.facts["refine"]
    plain = prepare_queries(model, factors, asked())
    plain.save(tmp_path)
    assert Queries.load(tmp_path).refinement is None
    assert plain.identity != prepared.identity


@pytest.mark.parametrize("method", ["cg:4", "astra:4"])
def test_interrupted_and_continued_is_bitwise_the_same(method, fitted, tmp_path, monkeypatch):
    """After the second iteration of the first query, and of the second."""
    monkeypatch.setattr(Pace, "due", property(lambda _: True))
    monkeypatch.setattr(refine, "VECTOR_BYTES", 0)

    def run(out, interrupt):
        done = []

        def told(stage, count, _):
            if stage == "refinement":
                done.append(count)
                if interrupt and count == 2:
                    raise KeyboardInterrupt

        more = {"refine": method, "dataset": corpus(), "progress": told, "rank": None}
        try:
            prepare_queries(*fitted, asked(2), out=tmp_path / out, **more)
        except KeyboardInterrupt:
            assert interrupt
        return done

    assert run("whole", False) == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [run("parts", x) for x in (True, True, False)] == [[1, 2], [3, 4, 1, 2], [3, 4]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert {x.name for x in parts.iterdir()} == {x.name for x in whole.iterdir()}
    assert not list(parts.glob("*_state*"))
    assert (parts / "queries.safetensors").read_bytes() == (
        whole / "queries.safetensors"
    ).read_bytes()


def changed(monkeypatch, at, change):
    """What `Refining.product` returns the `at`-th time, changed."""
    product, calls = refine.Refining.product, []

    def other(self, v, examples=None):
        calls.append(1)
        found = product(self, v, examples)
        return {n: change(x, v[n]) for n, x in found.items()} if len(calls) == at else found

    monkeypatch.setattr(refine.Refining, "product", other)


def first_gone(x, v):
    x[0] = torch.nan
    return x


def turned(x, v):
    """With much that is orthogonal to v."""
    pairs = v.flatten(1).unflatten(1, (-1, 2))
    return x + 1e6 * torch.stack([pairs[..., 1], -pairs[..., 0]], -1).view_as(v)


@pytest.mark.parametrize(
    ("change", "outcome", "why"),
    [
        (lambda x, v: x - 1e9 * v, Outcome.NEGATIVE_CURVATURE, "negative curvature"),
        (first_gone, Outcome.NOT_FINITE, "NaN or infinity"),
        (turned, Outcome.DIVERGED, "it diverges"),
    ],
)
def test_a_failure_stops_and_keeps_the_solution_before_it(
    change, outcome, why, fitted, monkeypatch
):
    model, factors = fitted
    more = {"rank": None, "dataset": corpus(), "damping": 0.5}
    wanted = prepare_queries(model, factors, asked(), refine="cg:2", **more)
    whole = prepare_queries(model, factors, asked(), refine="cg:4", **more)
    changed(monkeypatch, 4, change)  # the first is of the start
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepared = prepare_queries(model, factors, asked(), refine="cg:4", **more)
    stopped = [0] if outcome is Outcome.NOT_FINITE else [0, 1, 2]
    texts = [f"query {q}: cg stopped at iteration 3: {why}" for q in stopped]
    assert [str(x.message).partition(";")[0] for x in said] == texts
    for q in range(3):
        kept = wanted if q in stopped else whole
        assert prepared.refinement.outcomes[q] == (outcome if q in stopped else Outcome.DONE)
        assert prepared.refinement.iterations[q] == (2 if q in stopped else 4)
        for a, b in zip(prepared.layers, kept.layers, strict=True):
            close(a.P[q], b.P[q], 1e-5)
    assert f"stopped at iteration 3: {why}" in prepared.refinement.told(0)


def test_a_descent_that_diverges_leaves_ekfacs_solution(tmp_path, monkeypatch):
    model, data = gpt2(), corpus()
    factors = fit(model, data, out=tmp_path / "f")
    plain = prepare_queries(model, factors, asked(), rank=None)
    monkeypatch.setattr(refine, "RATE", 30.0)
    with pytest.warns(Notice, match=r"astra stopped at iteration \d+: it diverges; EK-FAC's"):
        prepared = prepare_queries(
            model, factors, asked(), rank=None, refine="astra:200", dataset=data
        )
    for a, b in zip(prepared.layers, plain.layers, strict=True):
        close(a.P, b.P, 1e-4)
    close(prepared.residual, prepared.refinement.before, 1e-4)


def test_a_solution_that_is_worse_is_told(tmp_path):
    model, data = gpt2(), corpus()
    factors = fit(model, data, out=tmp_path / "f")
    with pytest.warns(Notice, match="query 0: after 1 iterations of lissa the solution is farther"):
        prepare_queries(model, factors, asked(1), damping=1, refine="lissa:1", dataset=data)


def test_zero_gradients_are_solved_by_zero():
    b = {"a": torch.zeros(2, 3, 4)}
    solver = solvers.ConjugateGradients.start(b, b, lambda r: dict(r))
    solver.step(lambda v: dict(v), lambda r: dict(r))
    assert (solver.outcomes == Outcome.CONVERGED).all()
    assert not solver.x["a"].any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"refine": "newton:3"}, r"refine is 'newton:3', expected a method.*'cg:10', 'lissa:5000'"),
        ({"refine": "cg:0"}, "refine is 'cg:0', expected at least 1 iteration"),
        ({"refine": "cg:-1"}, "refine is 'cg:-1'"),
        ({"refine": "cg:"}, "refine is 'cg:'"),
        ({"refine": "cg:³"}, "refine is 'cg:³'"),
        ({"refine": "cg:" + "9" * 30}, "refine is 'cg:999"),
        ({"refine": 10}, "refine is 10"),
        ({"refine": "cg:1", "dataset": None}, "give dataset="),
        ({"refine": None}, "dataset and refine_examples are a refinement's"),
        ({"refine_examples": 0}, "refine_examples is 0"),
        ({"refine_examples": 13}, "refine_examples is 13, but the data set has 12"),
        ({"refine_seed": -1}, "refine_seed is -1"),
    ],
)
def test_what_is_refused(more, message, fitted):
    model, factors = fitted
    with pytest.raises(ArgumentError, match=message):
        prepare_queries(model, factors, asked(), **{"refine": "cg:1", "dataset": corpus()} | more)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    model = gpt2()
    return model, fit(model, corpus(), out=tmp_path_factory.mktemp("f") / "f")


def test_a_query_that_does_not_fit_is_refused(fitted, monkeypatch):
    monkeypatch.setattr(refine, "free_bytes", lambda _: 1000)
    with pytest.raises(ArgumentError, match=r"one query at full rank needs .* 1,000 are free"):
        prepare_queries(*fitted, asked(), refine="cg:1", dataset=corpus())


def test_a_task_that_does_not_tell_its_outputs_is_refused(tmp_path):
    class Silent(Classification):
        compute_outputs = None

    class Other(Classification):
        def compute_output_loss(self, outputs, batch):
            return 2 * super().compute_output_loss(outputs, batch)

    class Smoothed(LanguageModelTask):
        def compute_train_loss(self, batch, model, sample=False):
            return 2 * super().compute_train_loss(batch, model, sample)

    _, _, data = MADE["classification"]()
    model = mlp(4)
    for task, message in (
        (Silent(), "Hessian of Silent's loss in the model's outputs is not known"),
        (Other(), r"compute_output_loss of compute_outputs is .* they have to be the same sum"),
    ):
        out = tmp_path / type(task).__name__
        Silent.compute_train_loss = Other.compute_train_loss = drawn
        factors = fit(model, data, out=out, task=task)
        with pytest.raises(ArgumentError, match=message):
            prepare_queries(model, factors, data[:1], task=task, refine="cg:1", dataset=data)
    factors = fit(gpt2(), corpus(), out=tmp_path / "s", task=Smoothed())
    with pytest.raises(ArgumentError, match="Hessian of Smoothed's loss"):
        prepare_queries(gpt2(), factors, asked(), task=Smoothed(), refine="cg:1", dataset=corpus())


def drawn(self, batch, model, sample=False):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def test_another_sample_is_another_run(fitted, tmp_path):
    more = {"refine": "cg:1", "dataset": corpus(), "out": tmp_path / "q"}
    first = prepare_queries(*fitted, asked(), refine_examples=5, **more)
    assert len(set(first.facts["refine"]["examples"])) == 5
    with pytest.raises(StoreError, match="refine"):
        prepare_queries(*fitted, asked(), refine_examples=5, refine_seed=1, **more)
