"""Whole jobs on a real GPU: held against the CPU, in bf16, out of memory's reach, without waiting.

`pytest --device cuda` runs the driver's other tests there.
"""

import warnings

import numpy as np
import pytest
import torch
from dense_ekfac import asked, corpus, gpt2, llama
from transformers import LlamaConfig, LlamaForCausalLM

if not torch.cuda.is_available():
    pytest.skip("no GPU: test_residency_cases.py pretends to have one", allow_module_level=True)

from ekfac_fast import fit, prepare_queries, score, self_scores
from ekfac_fast.curvature import offload
from ekfac_fast.stages.waiting import Waiting
from ekfac_fast.store.folder import Store

# Beside what `test_residency_cases.py` allows: a batch's four tensors, the numbers that draw its
# labels, the result, where padding is, which positions predict, the loss.
WAITS = 10


def wide_llama():
    """Layers of several tiles."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=256, intermediate_size=520, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=160, bos_token_id=0,
        eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(n, longest, seed):
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(0, 1024, rng.integers(20, longest)).tolist()} for _ in range(n)
    ]


def job(model, folder, data, queries, rank, **options):
    """Scores [Q,N] and self scores [N]; a detail adds up to its score."""
    factors = fit(model, data, out=folder / "f", **options)
    prepared = prepare_queries(model, factors, queries, rank=rank, **options)
    found = score(model, prepared, data, out=folder / "s", per_token=True, **options)
    own = self_scores(model, factors, data, out=folder / "own", **options)
    best = found.details(0)[0]
    assert best.score == pytest.approx(best.per_token.sum(), rel=1e-2)
    return np.array(found.matrix), np.array(own.matrix[0])


def off(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_job_is_that_of_the_cpu(make, rank, tmp_path):
    data, queries, options = corpus(30), asked(), {"batch_tokens": 64}
    here = job(make(torch.float64), tmp_path / "cpu", data, queries, rank, **options)
    # Truncated, a query is what random columns make of it: the same ones on any device.
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        model = make(dtype).cuda()
        there = job(model, tmp_path / str(dtype), data, queries, rank, **options)
        for found, expected in zip(there, here, strict=True):
            assert off(found, expected) < tolerance


@pytest.mark.parametrize("rank", [None, 16])
def test_a_job_in_bf16_is_near_that_in_fp32(rank, tmp_path):
    data, queries = texts(40, 150, 0), texts(4, 60, 1)
    exact = job(wide_llama().double(), tmp_path / "64", data, queries, rank, batch_tokens=1000)
    for name, lowered in (("autocast", wide_llama()), ("whole", wide_llama().bfloat16())):
        options = {"autocast": torch.bfloat16} if name == "autocast" else {}
        there = job(
            lowered.cuda(), tmp_path / name, data, queries, rank, batch_tokens=1000, **options
        )
        for found, expected in zip(there, exact, strict=True):
            assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95


def test_bases_that_travel_are_those_that_stay(tmp_path, monkeypatch):
    data, queries, options = texts(40, 150, 0), texts(4, 60, 1), {"batch_tokens": 500}
    model = wide_llama().cuda()
    stay = job(model, tmp_path / "stay", data, queries, 16, **options)
    monkeypatch.setattr(offload, "fits", lambda *_: False)
    monkeypatch.setattr(Waiting, "takes", lambda *_: False)
    travel = job(model, tmp_path / "travel", data, queries, 16, **options)
    for found, expected in zip(travel, stay, strict=True):
        assert off(found, expected) < 1e-5


@pytest.mark.parametrize("rank", [None, 4])
def test_the_host_waits_as_often_whatever_the_number_of_layers(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "due", False)
    model, data = llama().cuda(), corpus(24)
    waited = {}
    for layers in (["model.layers.0.mlp.down_proj"], "mlp"):
        folder = tmp_path / str(len(layers))
        factors = fit(model, data, out=folder / "f", layers=layers, batch_tokens=40)
        prepared = prepare_queries(model, factors, asked(), rank=rank)
        score(model, prepared, data, out=folder / "warm", batch_tokens=40)
        for times in (1, 3):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    out = folder / f"{times}"
                    score(model, prepared, data * times, out=out, batch_tokens=40)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            waited[str(layers), times] = sum("synchronizing" in str(x.message) for x in said)
    batches = 2 * sum(len(x["input_ids"]) for x in data) / 40  # at least so many more
    per_batch = [
        (waited[str(layers), 3] - waited[str(layers), 1]) / batches
        for layers in (["model.layers.0.mlp.down_proj"], "mlp")
    ]
    assert per_batch[0] == per_batch[1] <= WAITS
