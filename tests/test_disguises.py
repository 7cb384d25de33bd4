"""Models that look like others: a layer's output, weight or rows are not what its class says."""

import numpy as np
import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, llama, weight_gradient
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers import BartConfig, BartForConditionalGeneration

from ekfac_fast import (
    LanguageModelTask,
    Notice,
    Scores,
    capture,
    fit,
    prepare_queries,
    score,
    self_scores,
)
from ekfac_fast.errors import ArgumentError, DataError, ModelError, StoreError
from ekfac_fast.model.layers import select_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
DOWN = "model.layers.0.mlp.down_proj"


def job(model, folder, data=None, **how):
    """Scores [Q,N] and the queries they are of."""
    data = corpus(6) if data is None else data
    queries = prepare_queries(model, fit(model, data, out=folder / "f", **how), asked(), rank=None)
    return np.array(score(model, queries, data, out=folder / "s").matrix), queries


def brute(model, queries, data):
    """<(G + damping)^-1 grad f, grad L_i> by autograd on the weights themselves: [Q,N]."""
    found = []
    for i, example in enumerate(data):
        loss = LanguageModelTask().compute_train_loss(batch_of(example | {"id": i}), model)
        found.append(
            sum(
                (x.dense() * weight_gradient(model, x.layer.name, loss)).sum((1, 2))
                for x in queries.layers
            )
        )
    return torch.stack(found, 1).detach()


def hooked(model):
    model.get_submodule(DOWN).register_forward_hook(lambda module, given, y: 2 * y)


def overridden(model):
    layer = model.get_submodule(DOWN)
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)


@pytest.mark.parametrize("disguise", [hooked, overridden])
def test_an_output_that_is_not_the_product_is_refused(disguise, tmp_path):
    model = llama(torch.float64)
    disguise(model)
    with pytest.raises(ModelError, match=rf"{DOWN}.*does not compute W x \+ b"):
        fit(model, corpus(4), out=tmp_path)

    def loop():
        with capture(model, scale=1.0) as found:
            model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
            found.take_covariances()

    with pytest.raises(ModelError, match=rf"{DOWN}.*does not compute W x \+ b"):
        loop()


@pytest.mark.parametrize("watch", [False, True])
def test_hooks_that_only_look_and_wrapped_forwards_change_nothing(watch, tmp_path):
    model = llama(torch.float64)
    layer = model.get_submodule(DOWN)
    if watch:
        layer.register_forward_hook(lambda module, given, y: None)
    else:
        layer.forward = layer.forward
    data = corpus(4)
    scores, queries = job(model, tmp_path, data)
    close(torch.from_numpy(scores), brute(model, queries, data), 1e-6)


def test_a_head_that_scales_inside_has_its_logits_whole(tmp_path):
    model, data = llama(torch.float64), corpus(6)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 0.25 * own(x)
    scores, queries = job(model, tmp_path, data)
    close(torch.from_numpy(scores), brute(model, queries, data), 1e-6)


def test_a_weight_that_is_also_read_elsewhere_is_refused(tmp_path):
    model = llama(torch.float64)
    mlp = model.model.layers[0].mlp

    def forward(x):
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(h) + F.linear(0.5 * h, mlp.down_proj.weight)

    mlp.forward = forward
    with pytest.raises(ModelError, match=rf"{DOWN}: its weight is in 2 products .* module makes 1"):
        fit(model, corpus(4), out=tmp_path / "f")
    up, down = mlp.up_proj, mlp.down_proj
    mlp.forward = lambda x: down(mlp.act_fn(mlp.gate_proj(x)) * (up(x) + x @ up.weight.T))
    with pytest.raises(ModelError, match="up_proj: its weight is in 2 products"):
        fit(model, corpus(4), out=tmp_path / "g")


class Unpadded(nn.Module):
    """Its layers see the real tokens alone, one after the other."""

    def __init__(self, vocabulary=61, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(vocabulary, width)
        self.first, self.second = nn.Linear(width, 16), nn.Linear(16, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        h = self.emb(input_ids)
        h = h + 0.1 * h.cumsum(1)
        real = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        rows = h[real]
        rows = rows + self.second(torch.relu(self.first(rows)))
        logits = self.head(torch.zeros_like(h).masked_scatter(real[..., None], rows))
        return type("Output", (), {"logits": logits})


def test_rows_of_real_tokens_alone_are_told_apart_or_refused(tmp_path):
    model, rng = Unpadded().double(), np.random.default_rng(0)
    even, uneven = (
        [{"input_ids": rng.integers(0, 61, n).tolist()} for n in sizes]
        for sizes in ([8] * 6, [3, 3, 6])
    )
    layers = {"layers": ["first", "second"]}
    queries = prepare_queries(model, fit(model, even, out=tmp_path / "f", **layers), even[:1])
    whole = score(model, queries, even, out=tmp_path / "even")
    close(torch.from_numpy(np.array(whole.matrix)), brute(model, queries, even), 1e-6)
    with pytest.raises(ModelError, match=r"which rows belong to which sequence .*batch_tokens=1"):
        score(model, queries, uneven, out=tmp_path / "uneven")
    alone = score(model, queries, uneven, out=tmp_path / "alone", batch_tokens=1)
    close(torch.from_numpy(np.array(alone.matrix)), brute(model, queries, uneven), 1e-6)


def z_loss(out):
    return 0.1 * out.logits.logsumexp(-1).square().mean()


def divergence(out):
    log_p = out.logits.log_softmax(-1)
    return F.kl_div(log_p, log_p.detach().roll(1, -1).exp(), reduction="batchmean")


@pytest.mark.parametrize("term", [z_loss, divergence])
def test_a_term_of_the_logits_beside_the_loss_is_refused_until_a_scale_is_given(term, tmp_path):
    model = llama(torch.float64)
    data = [{"input_ids": list(range(i, i + 8))} for i in range(4)]
    queries = prepare_queries(model, fit(model, data, out=tmp_path / "f"), asked(), rank=None)
    ids = torch.tensor([x["input_ids"] for x in data])

    def step(how):
        with capture(model, queries=queries, **how) as found:
            out = model(input_ids=ids, labels=ids)
            (out.loss + term(out)).backward()
            return found.take_scores()

    with pytest.raises(ModelError, match="a term of the model's logits beside the loss"):
        step({})
    assert len(step({"scale": float(ids[:, 1:].numel())})) == 1


def test_another_activation_is_another_model(tmp_path):
    model, data = llama(torch.float64), corpus(4)
    _, queries = job(model, tmp_path, data)
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    with pytest.raises((StoreError, ValueError), match="other weights or another configuration"):
        score(model, queries, data, out=tmp_path / "s")
    assert Scores(tmp_path / "s").matrix.shape == (3, 4)


def test_an_adapter_that_is_switched_off_or_turned_up_is_another_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        gpt2(torch.float64), LoraConfig(target_modules=["c_fc"], r=2, fan_in_fan_out=True)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    data = corpus(4)
    _, queries = job(model, tmp_path, data)
    other = "other weights or another configuration"
    with model.disable_adapter(), pytest.raises(ValueError, match=other):
        score(model, queries, data, out=tmp_path / "s")
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    layer.scaling["default"] *= 2
    with pytest.raises(ValueError, match=other):
        score(model, queries, data, out=tmp_path / "s")
    layer.scaling["default"] /= 2
    score(model, queries, data, out=tmp_path / "s")


def test_a_default_without_parametrised_layers_says_so():
    model = llama(torch.float64)
    weight_norm(model.get_submodule(DOWN))
    with pytest.warns(Notice, match=rf"1 layers have a weight .* made of other .* {DOWN}"):
        chosen = select_layers(model)
    assert len(chosen) == 5
    assert DOWN in {x.name for x in select_layers(model, ["*.mlp.*"])}


class Tenth(LanguageModelTask):
    """A loss of its own."""

    def compute_train_loss(self, batch, model, sample=False):
        return 0.1 * super().compute_train_loss(batch, model, sample)


def test_a_loss_that_the_factors_were_not_fitted_with_is_refused(tmp_path):
    model, data, task = gpt2().eval(), corpus(5), Tenth()
    factors = fit(model, data, out=tmp_path / "f", task=task)
    # What is measured of a query may be another task's.
    queries = prepare_queries(model, factors, asked())
    message = r"{}: the factors were fitted with the loss of Tenth, .* is that of LanguageModelTask"
    with pytest.raises(ArgumentError, match=message.format("score")):
        score(model, queries, data, out=tmp_path / "s")
    with pytest.raises(ArgumentError, match=message.format("self_scores")):
        self_scores(model, factors, data, out=tmp_path / "own")
    score(model, queries, data, out=tmp_path / "s", task=task)


def test_padding_that_would_be_read_as_text_is_refused(tmp_path):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=32, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).double().eval()

    class Translation:
        def compute_train_loss(self, batch, model, sample=False):
            z = model(**batch).logits.flatten(0, 1)
            labels = batch["labels"].flatten()
            if sample:
                drawn = torch.distributions.Categorical(logits=z).sample()
                labels = torch.where(labels < 0, labels, drawn)
            return F.cross_entropy(z, labels, ignore_index=-100, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return None

        def get_attention_mask(self, batch):
            return None

    data = [
        {"input_ids": torch.arange(3, 6 + n), "labels": torch.arange(9, 12 + n)} for n in range(4)
    ]
    masked = [x | {"attention_mask": torch.ones_like(x["input_ids"])} for x in data]
    how = {"task": Translation()}
    with pytest.raises(
        DataError, match=r"examples 0 to 1: input_ids of 3 to 4 tokens and no atten"
    ):
        fit(model, data, out=tmp_path / "refused", **how)
    factors = fit(model, data, out=tmp_path / "f", batch_size=1, **how)
    queries = prepare_queries(model, factors, data[:2], batch_size=1, rank=None, **how)
    alone = score(model, queries, data, out=tmp_path / "alone", batch_size=1, **how)
    together = score(model, queries, masked, out=tmp_path / "together", **how)
    np.testing.assert_allclose(together.matrix, alone.matrix, rtol=1e-9)


@pytest.mark.parametrize("layers", [None, ["lm_head"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_batches_show_in_no_score_however_few_the_tokens_are(layers, dtype, tmp_path):
    """Of fewer tokens than a layer has columns, most eigenvectors stand for nothing."""
    model, found = llama(dtype).eval(), []
    for tokens in (1, 20, 1024):
        how = {"layers": layers, "batch_tokens": tokens}
        found.append(job(model, tmp_path / str(tokens), corpus(3), **how)[0])
    for each in found[1:]:
        distance = np.linalg.norm(each - found[0]) / np.linalg.norm(found[0])
        assert distance < (1e-5 if dtype == torch.float64 else 1e-3)
