"""Weights and data that are mapped from files, and change while a run reads them."""

import numpy as np
import pytest
import torch
from dense_ekfac import VOCABULARY, asked, corpus, gpt2
from transformers import GPT2LMHeadModel

from ekfac_fast import Factors, fit, prepare_queries, score
from ekfac_fast.data import open_tokens
from ekfac_fast.errors import DataError, ModelError, StoreError


def at_half(act):
    """Called by a stage as progress: once, when half of it is done."""
    done = []

    def progress(stage, now, total):
        if not done and 2 * now >= total:
            done.append(act())

    return progress


def test_a_weights_file_that_is_written_over(tmp_path):
    gpt2().save_pretrained(tmp_path / "m")
    other = gpt2()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    changed = (tmp_path / "other" / "model.safetensors").read_bytes()

    def write_over():
        with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
            file.write(changed)

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    with pytest.raises(ModelError, match=r"the model's .* has changed while it was run: its file"):
        fit(model, corpus(), out=tmp_path / "f", progress=at_half(write_over), batch_tokens=40)
    with pytest.raises(StoreError, match="not finished"):
        Factors(tmp_path / "f")


def test_a_model_that_is_trained_meanwhile(tmp_path):
    model = gpt2().eval()
    factors = fit(model, corpus(), out=tmp_path / "f")

    def step():
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.mul_(1.001)

    queries = prepare_queries(model, factors, asked())
    whole = score(model, queries, corpus(), out=tmp_path / "w", batch_tokens=40)
    with pytest.raises(ModelError, match=r"the model's transformer\.h\.1\.mlp\.c_fc\.weight has"):
        score(model, queries, corpus(), out=tmp_path / "s", progress=at_half(step), batch_tokens=40)
    again = score(gpt2().eval(), queries, corpus(), out=tmp_path / "s", batch_tokens=40)
    assert np.array_equal(again.matrix, whole.matrix), "nothing that the other model made counts"


def test_tokens_that_are_written_over(tmp_path):
    file, rng = tmp_path / "tokens.bin", np.random.default_rng(0)
    rng.integers(0, VOCABULARY, 400).astype(np.uint16).tofile(file)
    model, data = gpt2().eval(), open_tokens(file, 16)

    def write_over():
        with file.open("r+b") as other:
            other.write(rng.integers(0, VOCABULARY, 400).astype(np.uint16).tobytes())

    with pytest.raises(DataError, match=r"tokens\.bin has changed while it was read"):
        fit(model, data, out=tmp_path / "f", progress=at_half(write_over), batch_tokens=64)
    fit(model, open_tokens(file, 16), out=tmp_path / "g", batch_tokens=64)
