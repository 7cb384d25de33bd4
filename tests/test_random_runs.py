"""Random models, tasks, corpora, masks and settings, end to end, against dense EK-FAC in fp64.

`python tests/test_random_runs.py 300` runs a longer leg of the same.
"""

import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_ekfac import VOCABULARY, dense_ekfac, gpt2, llama
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from ekfac_fast import LanguageModelTask, fit, prepare_queries, score, self_scores
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


def shared():
    """Two blocks with one matrix: their gradients add up."""
    model = llama()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    return model


class Regression(nn.Module):
    """Two layers and a third that reads the same input, on vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) + self.c(x)


class Squares:
    """Half the squared error; sampled targets are the output with an example's own noise."""

    def compute_train_loss(self, batch, model, sample=False):
        found = model(batch["x"])
        target = found.detach() + batch["noise"] if sample else batch["y"]
        return (found - target).square().sum() / 2

    def compute_measurement(self, batch, model):
        return model(batch["x"]).tanh().sum()

    def get_influence_tracked_modules(self):
        return ["a", "b", "c"]

    def get_attention_mask(self, batch):
        return None


class Margins(LanguageModelTask):
    """Measures how far each label's logit is above the mean; trains on twice the loss."""

    def compute_train_loss(self, batch, model, sample=False):
        return 2 * super().compute_train_loss(batch, model, sample)

    def compute_measurement(self, batch, model):
        logits, labels = self.logits(batch, model)[:, :-1], batch["labels"][:, 1:]
        chosen = logits.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        return torch.where(labels >= 0, chosen - logits.mean(2), 0).sum()


MODELS = (gpt2, llama, opt, neox, shared)


def vectors(rng, dtype):
    """An example of the regression."""
    sizes = {"x": 6, "y": 3, "noise": 3}
    return {k: torch.tensor(rng.normal(size=n), dtype=dtype) for k, n in sizes.items()}


def sequence(rng, packs):
    """One of 2 to 20 tokens: without its padding, and as it is given.

    Padded on either side or not; with labels of its own or without; of several documents, if the
    model `packs`, whose positions begin again.
    """
    ids = rng.integers(3, VOCABULARY, rng.integers(2, 21))
    plain = {"input_ids": ids.tolist()}
    # The first label predicts nothing, whatever it is.
    starts = np.zeros(len(ids), bool)
    if packs:
        starts[rng.integers(1, len(ids) + 1, rng.integers(0, 3)) - 1] = True
        starts[0], starts[-1] = True, False
        begun = np.maximum.accumulate(np.where(starts, np.arange(len(ids)), 0))
        plain["position_ids"] = (np.arange(len(ids)) - begun).tolist()
    own = rng.random() < 0.4
    labels = np.where((rng.random(len(ids)) < 0.3) & own | starts, -100, ids)
    labels[-1] = ids[-1]
    given = dict(plain)
    plain["labels"] = labels.tolist()
    left, right = rng.integers(0, 4, 2) if rng.random() < 0.4 else (0, 0)
    if own or left or right:
        given["labels"] = [-100] * left + plain["labels"] + [-100] * right
    if left or right:
        given["input_ids"] = [0] * left + plain["input_ids"] + [0] * right
        given["attention_mask"] = [0] * left + [1] * len(ids) + [0] * right
        if packs:
            given["position_ids"] = [0] * left + plain["position_ids"] + [0] * right
    return plain, given


def drawn(rng, dtype):
    """A model's maker, a task, pairs of examples and of queries: plain, and as they are given."""
    if rng.random() < 0.15:
        examples = [vectors(rng, torch.float64) for _ in range(rng.integers(20, 60))]
        given = [{k: x.to(dtype) for k, x in e.items()} for e in examples]
        pairs = list(zip(examples, given, strict=True))
        return Regression, Squares(), pairs[:-2], pairs[-2:]
    make = MODELS[rng.integers(len(MODELS))]
    packs = make in (gpt2, llama, neox, shared) and rng.random() < 0.4
    # Enough tokens for covariances of full rank: eigenvectors of equal eigenvalues (0, say) are
    # anybody's choice, and EK-FAC's answer depends on it.
    pairs = [sequence(rng, packs) for _ in range(rng.integers(18, 25))]
    asked = [sequence(rng, packs) for _ in range(rng.integers(1, 4))]
    return make, Margins() if rng.random() < 0.3 else LanguageModelTask(), pairs, asked


def some_layers(rng, model):
    """None, or three of the layers; an output layer only where it is not the embedding."""
    linear = [n for n in linear_layers(model) if "lm_head" not in n and "embed_out" not in n]
    return None if rng.random() < 0.5 else rng.choice(linear, min(3, len(linear)), False).tolist()


def largest(found, wanted):
    """The largest error of scores and self scores, relative to the largest of each."""
    pairs = zip(found, wanted, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)


def largest_error(seed, out):
    """Of one random run, and what it may be: 1e-4; or, of passes in bf16 autocast, twice as much as
    that of the definitions with passes in bf16, and 0.01.
    """
    rng = np.random.default_rng(seed)
    dtype = (torch.float32, torch.float64)[rng.integers(2)]
    make, task, pairs, asked = drawn(rng, dtype)
    model = make().to(dtype)
    chosen = some_layers(rng, model)
    wanted = chosen or task.get_influence_tracked_modules()
    layers = select_layers(model, wanted, shared=make is shared)
    names = {layer.name: (layer.name, *layer.also) for layer in layers}
    plain, given = ([pair[side] for pair in pairs] for side in range(2))
    damping = None if rng.random() < 0.5 else float(rng.uniform(0.01, 1))
    defined = partial(dense_ekfac, make(), names, plain, [x for x, _ in asked], damping, task)
    want = defined()[:2]
    lowered = dtype == torch.float32 and make is not Regression and rng.random() < 0.25
    sizes = [
        {"batch_tokens": int(rng.integers(20, 200)), "batch_size": int(rng.integers(1, 20))}
        | {"task": task}
        for _ in range(3)
    ]
    factors = fit(
        model, given, out=out / "f", layers=chosen, shared_parameters=make is shared, **sizes[0]
    )
    # Sampled labels and eigenvectors are as they are in full precision; what follows is lowered.
    more = {"autocast": torch.bfloat16} if lowered else {}
    rank = None if rng.random() < 0.5 else 64  # exact: beyond every side
    prepared = prepare_queries(
        model, factors, [x for _, x in asked], rank=rank, damping=damping, **sizes[1], **more
    )
    got = score(model, prepared, given, out=out / "s", **sizes[2], **more).matrix
    selves = self_scores(
        model, factors, given, out=out / "i", damping=damping, **sizes[2], **more
    ).matrix[0]
    error = largest([torch.tensor(x[:]) for x in (got, selves)], want)
    if not lowered:
        return error, 1e-4
    return error, 2 * largest(defined(autocast=torch.bfloat16)[:2], want) + 0.01


@pytest.mark.parametrize("seed", range(24))
def test_any_run_is_dense_ekfac(tmp_path, seed):
    error, tolerance = largest_error(seed, tmp_path)
    assert error < tolerance


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = {}
    for seed in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as out:
            found[seed] = largest_error(seed, Path(out))
    for name, lowered in (("fp32 and fp64", False), ("bf16 autocast", True)):
        errors = {seed: x for seed, x in found.items() if (x[1] > 1e-4) == lowered}
        worst = sorted(errors, key=lambda seed: -errors[seed][0] / errors[seed][1])[:5]
        print(f"{len(errors)} runs in {name}; the worst seeds, their errors and what these may be:")
        print({seed: errors[seed] for seed in worst})
    sys.exit(any(error >= most for error, most in found.values()))
