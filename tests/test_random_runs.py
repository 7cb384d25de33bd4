"""Random models, corpora, masks and settings, end to end, against dense EK-FAC in fp64.

`python tests/test_random_runs.py 300` runs a longer leg of the same.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_ekfac import VOCABULARY, dense_ekfac, gpt2, llama
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from ekfac_fast import fit, prepare_queries, score, self_scores
from ekfac_fast.model.layers import linear_layers, select_layers


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=24, word_embed_proj_dim=16,
        dropout=0.0, pad_token_id=None,
    )  # fmt: skip
    return OPTForCausalLM(config)


def neox():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=24,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


MODELS = (gpt2, llama, opt, neox)


def sequence(rng):
    """One of 2 to 20 tokens, padded on either side or not, with or without labels of its own."""
    ids = rng.integers(3, VOCABULARY, rng.integers(2, 21))
    plain = {"input_ids": ids.tolist()}
    if rng.random() < 0.4:
        labels = np.where(rng.random(len(ids)) < 0.3, -100, ids)
        labels[-1] = ids[-1]
        plain["labels"] = labels.tolist()
    given = dict(plain)
    if rng.random() < 0.4:
        left, right = rng.integers(0, 4, 2)
        given["input_ids"] = [0] * left + plain["input_ids"] + [0] * right
        given["attention_mask"] = [0] * left + [1] * len(ids) + [0] * right
        labels = plain.get("labels", plain["input_ids"])
        given["labels"] = [-100] * left + labels + [-100] * right
    return plain, given


def largest_error(seed, out):
    """Of scores and self scores of one random run, relative to the largest score."""
    rng = np.random.default_rng(seed)
    make = MODELS[rng.integers(len(MODELS))]
    dtype = (torch.float32, torch.float64)[rng.integers(2)]
    model = make().to(dtype)
    linear = [n for n in linear_layers(model) if "lm_head" not in n and "embed_out" not in n]
    chosen = None if rng.random() < 0.5 else rng.choice(linear, 3, replace=False).tolist()
    names = [layer.name for layer in select_layers(model, chosen)]
    # Enough tokens for covariances of full rank: eigenvectors of equal eigenvalues (0, say) are
    # anybody's choice, and EK-FAC's answer depends on it.
    pairs = [sequence(rng) for _ in range(rng.integers(18, 25))]
    plain, given = ([pair[side] for pair in pairs] for side in range(2))
    asked = [pair for pair in (sequence(rng) for _ in range(rng.integers(1, 4)))]
    damping = None if rng.random() < 0.5 else float(rng.uniform(0.01, 1))
    want, own, _ = dense_ekfac(make(), names, plain, [x for x, _ in asked], damping)
    tokens = [int(x) for x in rng.integers(20, 200, 3)]
    factors = fit(model, given, out=out / "f", layers=chosen, batch_tokens=tokens[0])
    rank = None if rng.random() < 0.5 else 64  # exact: beyond every side
    prepared = prepare_queries(
        model, factors, [x for _, x in asked], rank=rank, damping=damping, batch_tokens=tokens[1]
    )
    got = score(model, prepared, given, out=out / "s", batch_tokens=tokens[2]).matrix
    selves = self_scores(
        model, factors, given, out=out / "i", damping=damping, batch_tokens=tokens[2]
    ).matrix[0]
    return max(
        float((torch.tensor(x[:]).double() - y).abs().max() / y.abs().max())
        for x, y in ((got, want), (selves, own))
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_run_is_dense_ekfac(tmp_path, seed):
    assert largest_error(seed, tmp_path) < 1e-4


if __name__ == "__main__":
    errors = {}
    for seed in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as out:
            errors[seed] = largest_error(seed, Path(out))
    worst = sorted(errors, key=lambda seed: -errors[seed])[:5]
    print(f"{len(errors)} runs; the largest errors, by seed:", {s: errors[s] for s in worst})
    sys.exit(max(errors.values()) >= 1e-4)
