"""Eigenvalues corrected on some of the examples: exact on those, said, and never of nothing."""

import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, weight_gradient
from safetensors.torch import load_file
from test_experts import MIXTRAL
from test_model_families import made

from ekfac_fast import Factors, LanguageModelTask, fit, prepare_queries, score
from ekfac_fast.errors import Notice, StoreError

SOME = 5
CHOSEN = (0, 2, 4, 7, 9)  # i * 12 // 5


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model in fp64, twelve examples, and factors with eigenvalues of all and of five."""
    folder, model, data = tmp_path_factory.mktemp("fits"), gpt2(torch.float64).eval(), corpus(12)
    how = {"batch_tokens": 40}
    return model, data, fit(model, data, out=folder / "all", **how), fit(
        model, data, out=folder / "some", eigenvalue_examples=SOME, **how
    )  # fmt: skip


def test_they_are_the_mean_over_evenly_spaced_examples(fitted):
    model, data, whole, some = fitted
    task = LanguageModelTask()
    for name, factors in some.items():
        each = [
            factors.Qg.T
            @ weight_gradient(
                model,
                name,
                task.compute_train_loss(batch_of(data[i] | {"id": i}), model, sample=True),
            )
            @ factors.Qa
            for i in CHOSEN
        ]
        close(factors.lam, torch.stack(each).square().mean(0), 1e-6)
    for side in ("activation", "gradient"):
        a, b = (load_file(x.folder / f"{side}_covariance.safetensors") for x in (whole, some))
        assert all(torch.equal(a[name], b[name]) for name in whole)


def test_they_are_said(fitted, tmp_path):
    model, data, whole, some = fitted
    assert (whole.sample, some.sample) == (None, SOME)
    assert whole.sequences == some.sequences == len(data)
    queries = prepare_queries(model, some, asked())
    found = score(model, queries, data, out=tmp_path / "scores")
    assert "eigenvalues corrected on 5 of the examples" in found.trust.line
    queries = prepare_queries(model, whole, asked())
    assert "corrected" not in score(model, queries, data, out=tmp_path / "all").trust.line


def test_a_fit_is_continued_with_its_own_sample(fitted, tmp_path):
    model, data, whole, some = fitted
    again = fit(model, data, out=some.folder, eigenvalue_examples=SOME, batch_tokens=40)
    assert again.identity == some.identity != whole.identity
    with pytest.raises(StoreError, match="eigenvalue_examples"):
        fit(model, data, out=some.folder, eigenvalue_examples=SOME + 1, batch_tokens=40)
    # As many as there are, or more, are all.
    same = fit(model, data, out=whole.folder, eigenvalue_examples=len(data), batch_tokens=40)
    assert same.identity == Factors(whole.folder).identity


def test_an_expert_without_a_token_of_the_sample_takes_no_part(tmp_path):
    """Eigenvalues of zero would leave the damping alone to divide its gradients."""
    model = made("Mixtral", **MIXTRAL | {"num_local_experts": 8, "num_experts_per_tok": 1})
    data = [{"input_ids": [3, 4]}, *corpus(8)]
    whole = fit(model, data, out=tmp_path / "all", layers=["*.experts.*"])
    with pytest.warns(Notice, match=r"no gradient of the 1 examples .*experts.* take no part"):
        some = fit(
            model, data, out=tmp_path / "some", layers=["*.experts.*"], eigenvalue_examples=1
        )
    assert 0 < len(some) < len(whole)
    assert all(bool(x.lam.any()) for x in some.values())
