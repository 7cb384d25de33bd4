"""Output-token and input-token influence: per-token gradients, and finite differences."""

import numpy as np
import pytest
import torch
from dense_ekfac import asked, batch_of, corpus, gpt2, weight_gradient
from test_experts import MIXTRAL
from test_model_families import made
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages.attribution import attribute_tokens

MODELS = {
    "GPT-2": lambda: gpt2(torch.float64).eval(),
    "Llama": lambda: made("Llama", num_key_value_heads=1),
    "experts": lambda: made("Mixtral", **MIXTRAL),
}
PAIRS = [(1, 3), (0, 5), (1, 5), (0, 0), (0, 3)]


def data():
    examples = [example | {"id": i} for i, example in enumerate(corpus(8))]
    ids = examples[3]["input_ids"]
    examples[3]["labels"] = [-100, -100, *ids[2:]]
    return examples


@pytest.fixture(scope="module", params=MODELS)
def found(request, tmp_path_factory):
    model, folder = MODELS[request.param](), tmp_path_factory.mktemp("attribution")
    factors = fit(model, data(), out=folder / "f", batch_tokens=60)
    rank = None if request.param == "Llama" else 4
    queries = prepare_queries(model, factors, asked(2), rank=rank)
    scores = score(model, queries, data(), out=folder / "s").matrix
    seen = attribute_tokens(model, queries, data(), PAIRS, batch_tokens=160)
    return model, queries, scores, seen


def preconditioned(queries, q):
    return {x.layer.name: x.dense()[q] for x in queries.layers}


def influence(model, P, losses):
    """<P, gradient of a loss> by autograd on the parameters."""
    total = 0.0
    for name, matrix in P.items():
        try:
            total += float((matrix * weight_gradient(model, name, losses)).sum())
        except RuntimeError as error:  # an expert that no token meets
            assert "not have been used" in str(error)  # noqa: PT017
    return total


def per_token(model, example):
    """Losses of all targets, [T], at the targets' own places."""
    batch = batch_of(example)
    labels = batch["labels"][0, 1:]
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return F.pad(losses, (1, 0))


def test_in_the_order_of_the_pairs_they_add_up_to_the_scores(found):
    _, _, scores, seen = found
    assert [(x.query, x.index) for x in seen] == PAIRS
    largest = np.abs(scores).max()
    for x in seen:
        assert len(x.target) == len(x.input) == len(data()[x.index]["input_ids"])
        assert abs(x.score - scores[x.query, x.index]) < 1e-6 * largest
        assert x.target.sum() == pytest.approx(x.score)
        assert x.target[0] == 0
    assert not seen[0].target[:2].any()  # without labels


def test_a_targets_share_is_the_influence_of_its_loss_alone(found):
    model, queries, _, seen = found
    for x in seen[:2]:
        losses, P = per_token(model, data()[x.index]), preconditioned(queries, x.query)
        for t in (2, 4, len(x.target) - 1):
            expected = influence(model, P, losses[t])
            assert abs(x.target[t] - expected) < 1e-6 * np.abs(x.target).max()


@pytest.mark.parametrize("t", [0, 3])
def test_an_inputs_share_is_the_slope_along_its_scale(found, t):
    """Central differences at three step sizes come nearer and nearer."""
    model, queries, _, seen = found
    x = seen[1]
    P, table = preconditioned(queries, x.query), model.get_input_embeddings()

    def scaled(factor):
        def hook(_, __, output):
            scale = torch.ones(output.shape[1], dtype=output.dtype)
            scale[t] = factor
            return output * scale[:, None]

        handle = table.register_forward_hook(hook)
        try:
            return influence(model, P, per_token(model, data()[x.index]).sum())
        finally:
            handle.remove()

    slopes = [(scaled(1 + h) - scaled(1 - h)) / (2 * h) for h in (0.1, 0.01, 1e-3)]
    errors = [abs(slope - x.input[t]) / np.abs(x.input).max() for slope in slopes]
    # Norms and routers compute in fp32, whatever the model is: a difference cannot tell more.
    rounding = 1e-6 if isinstance(model, GPT2LMHeadModel) else 1e-3
    assert errors[2] < rounding
    assert errors[1] < 0.1 * errors[0] + rounding


def test_what_is_refused(found):
    model, queries, _, _ = found
    for pairs, message in (
        ([(2, 0)], "query is 2"),
        ([(0, 8)], "index is 8"),
        ([(0, 1, 2)], r"pairs is .*, expected \(query, index\)"),
        (3, "pairs is 3, expected a list"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attribute_tokens(model, queries, data(), pairs)
    assert attribute_tokens(model, queries, data(), []) == []

    class Own(LanguageModelTask):
        def compute_train_loss(self, batch, model, sample=False):
            return super().compute_train_loss(batch, model, sample) * 2

    with pytest.raises(ArgumentError, match="Own has a loss of its own"):
        attribute_tokens(model, queries, data(), PAIRS, task=Own())
