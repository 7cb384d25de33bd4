"""The detail pass with output tokens, input tokens and attention heads; and where it has none."""

import numpy as np
import pytest
import torch
from dense_ekfac import asked, batch_of, corpus, gpt2, weight_gradient
from test_model_families import made

from ekfac_fast import attribute_tokens, fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError
from ekfac_fast.model.heads import head_parts
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages import detail as stage
from ekfac_fast.stages.scores import Scores

MODELS = {
    "GPT-2": (lambda: gpt2(torch.float64).eval(), ["transformer.*"]),
    "Llama": (lambda: made("Llama", num_key_value_heads=1), ["*self_attn*", "*up_proj"]),
}


def data():
    return [example | {"id": i} for i, example in enumerate(corpus(9))]


@pytest.fixture(scope="module", params=MODELS)
def made_from(request, tmp_path_factory):
    build, patterns = MODELS[request.param]
    model, folder = build(), tmp_path_factory.mktemp("attributed")
    factors = fit(model, data(), out=folder / "f", layers=patterns, batch_tokens=60)
    queries = prepare_queries(model, factors, asked(3), rank=4)
    scores = score(model, queries, data(), out=folder / "s", attribution=True, batch_tokens=90)
    return model, queries, scores, folder


def both(scores):
    for q in range(3):
        for lowest in (False, True):
            yield from scores.details(q, lowest=lowest)


def test_output_tokens_sum_to_the_score(made_from):
    _, _, scores, _ = made_from
    assert scores.unattributed is None
    assert scores.stages["detail"] > 0
    found = list(both(scores))
    assert len(found) == 3 * (9 + 5)
    for x in found:
        slack = 1e-5 * np.abs(x.target).sum()
        assert abs(x.target.sum() - x.score) < slack
        assert abs(x.per_layer_token.sum() - x.score) < slack
        assert x.input.shape == x.target.shape == x.per_token.shape


def test_they_are_what_pairs_alone_have(made_from):
    model, queries, scores, _ = made_from
    some = scores.details(1)[:3]
    alone = attribute_tokens(model, queries, data(), [(1, x.index) for x in some])
    for x, y in zip(some, alone, strict=True):
        np.testing.assert_allclose(x.target, y.target, rtol=1e-6, atol=1e-9)
        # Norms compute in fp32, whatever the model is.
        np.testing.assert_allclose(x.input, y.input, rtol=0, atol=1e-6 * np.abs(y.input).max())


def test_heads_are_rows_and_columns_of_the_gradient(made_from):
    """By autograd on the weights, a block of rows (q, k, v) or of columns (o) at a time."""
    model, queries, scores, _ = made_from
    detail = scores.details(2)[0]
    loss = LanguageModelTask().compute_train_loss(batch_of(data()[detail.index]), model)
    per_layer = dict(zip(scores.layers, detail.per_layer, strict=True))
    size, checked = model.config.hidden_size // model.config.num_attention_heads, set()
    for own in queries.layers:
        each = own.dense()[2] * weight_gradient(model, own.layer.name, loss)
        heads = [x for x in detail.heads if x.layer == own.layer.name]
        if "attn" not in own.layer.name:
            assert not heads
            continue
        rows, outside = each.sum(1), 0.0
        if heads[0].part == "o":
            rows, outside = each[:, : own.layer.I].sum(0), float(each[:, own.layer.I :].sum())
        expected = rows.view(-1, size).sum(1).numpy()
        found = np.concatenate([x.values for x in heads])
        slack = 1e-6 * np.abs(expected).sum()
        np.testing.assert_allclose(found, expected, atol=slack)
        assert abs(found.sum() + outside - per_layer[own.layer.name]) < slack
        checked |= {(x.part, len(x.values)) for x in heads}
    few = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    many = model.config.num_attention_heads
    assert checked == {("q", many), ("k", few), ("v", few), ("o", many)}


@pytest.mark.parametrize(
    ("family", "layer", "parts"),
    [
        ("GPTNeoX", "*query_key_value", "qkv"),
        ("Phi3", "*qkv_proj", "qkv"),
        ("OPT", "*out_proj", "o"),
        ("GPTBigCode", "*c_attn", ""),  # rows in an order of its own
    ],
)
def test_heads_of_families(family, layer, parts):
    model = made(family)
    found = head_parts(model, select_layers(model, [layer]))
    every = [x for own in found.values() for x in own]
    assert "".join(x.part for x in every[: len(parts)]) == parts
    if not parts:
        assert not every
        return
    first = found[every[0].layer]
    rows = torch.cat([x.indices.flatten() for x in first]).sort()[0]
    weight = model.get_submodule(first[0].layer).weight
    assert torch.equal(rows, torch.arange(weight.shape[first[0].of_input]))


def test_a_heads_rows_are_those_that_its_queries_are_made_of():
    """GPT-NeoX: with the q rows of a head set to zero, that head attends to all alike."""
    model = made("GPTNeoX")
    (layer,) = select_layers(model, ["*.0.attention.query_key_value"])
    q = head_parts(model, [layer])[layer.name][0]
    module = model.get_submodule(layer.name)
    with torch.no_grad():
        module.weight[q.indices[1]] = 0
        module.bias[q.indices[1]] = 0
    model.set_attn_implementation("eager")
    ids = torch.arange(1, 7)[None]
    attention = model(input_ids=ids, output_attentions=True).attentions[0][0, :, -1]
    torch.testing.assert_close(attention[1], torch.full((6,), 1 / 6).to(attention))
    assert attention[0].std() > 1e-4


def test_a_pass_that_is_killed_ends_as_one_that_nobody_disturbed(made_from, monkeypatch):
    model, queries, scores, folder = made_from
    end, seen = stage.Details.end, []

    def killed(self, batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch.number)
        end(self, batch)

    monkeypatch.setattr(stage.Details, "end", killed)
    with pytest.raises(KeyboardInterrupt):
        score(model, queries, data(), out=folder / "k", attribution=True, batch_tokens=90)
    assert not Scores(folder / "k").store.finished
    monkeypatch.setattr(
        stage.Details, "end", lambda self, batch: (seen.append(batch.number), end(self, batch))
    )
    again = score(model, queries, data(), out=folder / "k", attribution=True, batch_tokens=90)
    assert len(seen) == len({*seen})
    for x, y in zip(both(scores), both(again), strict=True):
        assert np.array_equal(x.target, y.target)
        assert np.array_equal(x.input, y.input)
    assert not list((folder / "k").glob("*detail*"))


def test_it_may_be_asked_for_later(made_from):
    model, queries, scores, folder = made_from
    given = {"out": folder / "later", "batch_tokens": 90}
    before = score(model, queries, data(), per_token=True, **given)
    assert before.unattributed == "they were not asked for"
    assert before.details(0)[0].target is None
    matrix = (folder / "later/scores.npy").read_bytes()
    after = score(model, queries, data(), attribution=True, **given)
    assert after.unattributed is None
    np.testing.assert_allclose(after.details(0)[0].target, scores.details(0)[0].target)
    assert (folder / "later/scores.npy").read_bytes() == matrix
    assert {"scan", "detail"} <= after.stages.keys()
    with pytest.raises(ArgumentError, match="attribution is 1, expected True or False"):
        score(model, queries, data(), attribution=1, **given)


class Once(torch.autograd.Function):
    """x, of which the second derivative is refused."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class Own(LanguageModelTask):
    def compute_train_loss(self, batch, model, sample=False):
        return super().compute_train_loss(batch, model, sample)


@pytest.mark.parametrize("why", ["once", "own loss", "autocast"])
def test_where_there_is_none_the_reason_is_told(why, tmp_path):
    model = gpt2()
    if why == "once":
        model.transformer.h[1].mlp.act.register_forward_hook(lambda _, __, y: Once.apply(y))
    more = {"own loss": {"task": Own()}, "autocast": {"autocast": torch.bfloat16}}.get(why, {})
    factors = fit(model, data(), out=tmp_path / "f", **more)
    queries = prepare_queries(model, factors, asked(1), rank=4, **more)
    scores = score(model, queries, data(), out=tmp_path / "s", attribution=True, **more)
    said = {
        "once": "the model cannot be differentiated twice, which attribution to tokens needs",
        "own loss": "Own has a loss of its own",
        "autocast": "not taken under autocast (torch.bfloat16)",
    }
    assert said[why] in scores.unattributed
    detail = scores.details(0)[0]
    assert detail.target is detail.input is None
    assert detail.per_layer_token.sum() == pytest.approx(detail.score, rel=0.02, abs=0.02)
