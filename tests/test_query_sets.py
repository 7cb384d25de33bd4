"""What a query may be: a completion against another, a set of records, a function of the user's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from dense_ekfac import VOCABULARY, asked, close, corpus, gpt2, weight_gradient
from other_losses import log_p, pairs, sides_of
from small_networks import Collected, assert_equal

import ekfac_fast
from ekfac_fast import LanguageModelTask, PreferenceTask, fit, prepare_queries, score
from ekfac_fast.data.batches import Batches
from ekfac_fast.errors import ArgumentError, DataError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.stages.run import Run, Stage


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    model = gpt2(torch.float64)
    return model, fit(model, corpus(), out=tmp_path_factory.mktemp("f"))


def contrasts(n, seed=5):
    return [{k: p[k] for k in ("input_ids", "labels", "sides")} for p in pairs(n, VOCABULARY, seed)]


def test_a_completion_against_another(fitted, tmp_path):
    """The difference of two queries, in one."""
    model, factors = fitted
    both = contrasts(3)
    alone = [{"input_ids": i, "labels": y} for q in both for i, y in sides_of(q)]
    found = prepare_queries(model, factors, both, rank=None, batch_tokens=64)
    each = prepare_queries(model, factors, alone, rank=None)
    for a, b in zip(found.layers, each.layers, strict=True):
        close(a.P, b.P[0::2] - b.P[1::2], 1e-9)
    with torch.no_grad():
        true = [log_p(model, *r) - log_p(model, *c) for c, r in map(sides_of, both)]
    close(found.measurements, torch.stack(true), 1e-6)
    matrices = [
        np.array(score(model, q, corpus(), out=tmp_path / str(n)).matrix)
        for n, q in enumerate((found, each))
    ]
    close(matrices[0], torch.tensor(matrices[1][0::2] - matrices[1][1::2]), 1e-9)
    with pytest.raises(DataError, match=r"example 1: made of 1 sequence\(s\), the first example"):
        prepare_queries(model, factors, [both[0], asked(1)[0]])


@pytest.mark.parametrize("refine", [None, "cg:1"])
def test_a_set_is_the_sum_of_its_queries(fitted, tmp_path, refine):
    model, factors = fitted
    questions = asked(5)
    more = {"refine": refine, "dataset": corpus(4)} if refine else {}
    each = prepare_queries(model, factors, questions, rank=None, **more)
    labels = ["b", "a", None, "b", "b"]
    for reduce in ("sum", "mean"):
        found = prepare_queries(
            model, factors, questions, rank=None, sets=labels, reduce=reduce, batch_tokens=20,
            out=tmp_path / reduce, **more,
        )  # fmt: skip
        assert len(found) == 3
        assert [len(ids) for ids, _ in found.examples] == [30, 10, 10]
        members = [[0, 3, 4], [1], [2]]
        divisors = [len(m) if reduce == "mean" else 1 for m in members]
        both = list(zip(members, divisors, strict=True))
        close(
            found.measurements, torch.stack([each.measurements[m].sum() / d for m, d in both]), 1e-6
        )
        if refine:
            # Iterations for a sum are others than for its parts; a set of one is its query.
            for a, b in zip(found.layers, each.layers, strict=True):
                close(a.P[1:], b.P[1:3], 1e-9)
            continue
        for a, b in zip(found.layers, each.layers, strict=True):
            close(a.P, torch.stack([b.P[m].sum(0) / d for m, d in both]), 1e-9)
    assert found.identity != each.identity
    # A rank is taken of the sum.
    low = prepare_queries(model, factors, questions, rank=4, sets=labels, **more)
    dense = found.layers[0].P * torch.tensor([3.0, 1, 1]).view(3, 1, 1)
    assert low.layers[0].L.shape == (3, dense.shape[1], 4)
    energy = low.layers[0].dense().square().sum((1, 2)) / dense.square().sum((1, 2))
    close(low.layers[0].energy, energy, 1e-3)


def test_sets_that_fit_no_queries(fitted):
    model, factors = fitted
    for sets, told in ((["a"], "1 labels, but there are 3"), ([[1], [1], [2]], r"label \[1\]")):
        with pytest.raises(ArgumentError, match=told):
            prepare_queries(model, factors, asked(), sets=sets)
    with pytest.raises(ArgumentError, match="reduce is 'max'"):
        prepare_queries(model, factors, asked(), sets=["a"] * 3, reduce="max")


def test_a_set_that_was_killed_continues(fitted, tmp_path, monkeypatch):
    """Sets that are done stay so; the one under way begins again, and the bits are the same."""
    model, factors = fitted
    labels = [0, 1, 0, 1]
    whole = prepare_queries(model, factors, asked(4), rank=None, sets=labels, out=tmp_path / "a")
    from ekfac_fast.stages import measured

    done, end = [], measured.Summing.end

    def dies(self, batch):
        done.append(batch)
        if len(done) == 2:
            raise KeyboardInterrupt
        end(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(measured.Summing, "end", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare_queries(model, factors, asked(4), rank=None, sets=labels, out=tmp_path / "b")
    again = prepare_queries(model, factors, asked(4), rank=None, sets=labels, out=tmp_path / "b")
    assert torch.equal(again.layers[0].P, whole.layers[0].P)


def test_the_documented_measurement_runs(fitted, tmp_path):
    """The example of docs/questions.md, as it stands there."""
    page = (Path(__file__).parents[1] / "docs/questions.md").read_text()
    snippet, _ = re.findall(r"```python\n(.*?)```", page, re.S)
    space = {}
    exec(snippet, space)
    task = space["LogitDifference"](5, 9)
    model, factors = fitted
    queries = ekfac_fast.prepare_queries(model, factors, asked(), rank=None, task=task)
    with torch.no_grad():
        z = torch.stack([model(input_ids=ids[None]).logits[0, -1] for ids, _ in queries.examples])
    close(queries.measurements, z[:, 9] - z[:, 5], 1e-6)
    # Of the first query, by autograd on the parameters.
    name = queries.layers[0].layer.name
    ids = queries.examples[0][0]
    value = model(input_ids=ids[None]).logits[0, -1]
    gradient = weight_gradient(model, name, value[9] - value[5])
    Qg, Qa, lam = factors[name].Qg, factors[name].Qa, factors[name].lam
    P = Qg @ ((Qg.T @ gradient @ Qa) / (lam + queries.damping[0])) @ Qa.T
    close(queries.preconditioned(name)[0], P, 1e-9)


def test_pairs_of_a_mixture_of_experts(tmp_path):
    """Tokens of both sides that were routed to an expert are one example's."""
    torch.manual_seed(0)
    config = T.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip
    model = T.MixtralForCausalLM(config).double().eval()
    data, task = pairs(5, VOCABULARY), PreferenceTask(0.3)
    layers = select_layers(model)
    run, collected = Run(model, data, {"task": task, "batch_tokens": 90}), Collected()
    run.each(Stage.SCAN, layers, run.batches.divided(), collected)
    assert run.batches.sides == 2
    expected = {}
    for index, record in enumerate(data):
        batch = Batches([record], model, form=task.form(model)).load([0])
        loss = task.compute_train_loss(batch, model)
        for layer in layers:
            expected[layer.name, index] = weight_gradient(model, layer.name, loss).detach()
    got = {k: x for k, x in collected.found.items() if expected[k].abs().max() > 0}
    assert_equal(got, {k: x for k, x in expected.items() if k in got}, 1e-5)
    assert len(got) > len(layers)


def test_training_data_of_a_language_model_are_single_sequences(tmp_path):
    with pytest.raises(DataError, match="example 0: is a pair, expected one sequence"):
        fit(gpt2(), contrasts(2), out=tmp_path, task=LanguageModelTask())
