"""What a run refuses, by name."""

import pytest
import torch
from dense_ekfac import (
    CONTEXT,
    VOCABULARY,
    asked,
    corpus,
    gpt2,
)
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast.curvature.eigen import Job
from ekfac_fast.errors import Notice, StoreError
from ekfac_fast.stages.factors import Factors, LayerFactors
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.preparation import prepare_queries
from ekfac_fast.stages.scan import score, self_scores
from ekfac_fast.store.folder import Store


def test_other_settings_are_refused_by_name(tmp_path):
    data, model = corpus(), gpt2()
    fit(model, data, out=tmp_path / "f")
    with pytest.raises(StoreError, match=r"task_state\.seed"):
        fit(model, data, out=tmp_path / "f", seed=1)
    with pytest.raises(StoreError, match="data"):
        fit(model, data[:-1], out=tmp_path / "f")
    with pytest.raises(StoreError, match="layers"):
        fit(model, data, out=tmp_path / "f", layers="*.c_attn")
    other = gpt2()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    with pytest.raises(StoreError, match="model"):
        fit(other, data, out=tmp_path / "f")


def test_bad_input_is_named(tmp_path):
    data, model = corpus(), gpt2()
    with pytest.raises(ValueError, match=r"nearest are .*c_fc"):
        fit(model, data, out=tmp_path / "a", layers="*.c_fcc")
    with pytest.raises(ValueError, match=r"example 0.*outside the vocabulary"):
        fit(model, [{"input_ids": [1, 2, VOCABULARY]}], out=tmp_path / "b")
    with pytest.raises(ValueError, match=r"example 0.*no tokens"):
        fit(model, [{"input_ids": []}], out=tmp_path / "b2")
    with pytest.raises(ValueError, match="empty"):
        fit(model, [], out=tmp_path / "c")
    broken = gpt2()
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"loss is nan for examples \d+, "):
        fit(broken, data, out=tmp_path / "d")
    factors = fit(model, data, out=tmp_path / "f")
    wider = GPT2LMHeadModel(GPT2Config(**(model.config.to_diff_dict() | {"n_embd": 32})))
    with pytest.raises(ValueError, match=r"c_fc is .* belong to another model"):
        prepare_queries(wider, factors, asked())
    (tmp_path / "f" / "lambda_matrix.safetensors").write_bytes(b"\x10")
    with pytest.raises(StoreError, match=r"lambda_matrix\.safetensors"):
        _ = Factors(tmp_path / "f")["transformer.h.0.mlp.c_fc"]
    (tmp_path / "f" / "num_lambda_processed.safetensors").unlink()
    with pytest.raises(StoreError, match="num_lambda_processed"):
        Factors(tmp_path / "f")
    with pytest.raises(ValueError, match=r"layer x: lam holds NaN"):
        LayerFactors("x", torch.eye(2), torch.eye(3), torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="covariance of x contains NaN or infinity"):
        Job(torch.full((2, 2), torch.inf), torch.tensor(1), "the covariance of x").check()


def test_long_sequences_are_cut_and_counted_or_refused(tmp_path):
    data = [*corpus(3), {"input_ids": [1] * (CONTEXT + 5)}]
    model = gpt2()
    with pytest.warns(Notice, match="of 4 examples 1 are longer"):
        factors = fit(model, data, out=tmp_path / "f")
    assert Store.load(tmp_path / "f").state["truncated"] == 1
    queries = prepare_queries(model, factors, asked())
    message = rf"example 3: {CONTEXT + 5} tokens, the model has {CONTEXT} positions"
    for refused in (
        lambda: fit(model, data, out=tmp_path / "g", on_long="refuse"),
        lambda: score(model, queries, data, out=tmp_path / "s", on_long="refuse"),
        lambda: self_scores(model, factors, data, out=tmp_path / "i", on_long="refuse"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not any((tmp_path / name).exists() for name in "gsi")
