"""At the edge of what is meant: masks of other shapes, fields beside a text, nulls, brackets."""

import json

import numpy as np
import pytest
import torch
from dense_ekfac import asked, close, corpus, gpt2, weight_gradient
from plain_tasks import Translation
from small_networks import Net, assert_equal, captured, expected, sequences
from test_capture import plain
from test_data import bpe, jsonl
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ekfac_fast import Scores, fit, prepare_queries, score
from ekfac_fast.cli.inputs import Source
from ekfac_fast.data import read, read_queries, tokenize
from ekfac_fast.errors import DataError, Notice, StoreError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.store.files import save_json

SIZES = {"vocab_size": 97, "hidden_size": 32}


def test_the_context_that_is_asked_of_a_model_without_a_limit():
    model = BloomForCausalLM(BloomConfig(**SIZES, n_layer=1, n_head=4))
    assert Source("m", model, None).context(2048) == 2048
    assert Source("m", model, None).context(None) == 512
    with pytest.warns(Notice, match="context is 2048: the model has 24 positions"):
        assert Source("m", gpt2(), None).context(2048) == 24


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 9, 9)])
def test_masks_of_other_shapes_are_refused(shape, tmp_path):
    record = {"input_ids": list(range(9)), "attention_mask": torch.ones(shape, dtype=torch.int64)}
    with pytest.raises(DataError, match=r"example 1: attention_mask must be integers .T., not"):
        fit(gpt2(), [{"input_ids": [1, 2]}, record], out=tmp_path)


def test_token_types_reach_the_model():
    config = BertConfig(
        **SIZES, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, is_decoder=True
    )
    model = BertLMHeadModel(config).double().eval()
    data = [
        x | {"token_type_ids": torch.arange(len(x["input_ids"])) % 2} for x in sequences(12, 5, 9)
    ]
    names = [layer.name for layer in select_layers(model)]
    found = captured(model, data, names)
    for index, x in enumerate(data):
        ids, types = x["input_ids"], x["token_type_ids"]
        logits = model(input_ids=ids[None], token_type_ids=types[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        for name in names:
            close(found[name, index], weight_gradient(model, name, loss), 1e-10)
    without = captured(model, [{"input_ids": x["input_ids"]} for x in data], names)
    assert (found[names[0], 0] - without[names[0], 0]).abs().max() > 1e-6


def test_a_padded_source_of_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model, task = T5ForConditionalGeneration(config).double().eval(), Translation()
    sources, targets = sequences(12, 5, 9), sequences(4, 7, 3, seed=1)
    data = [
        {"input_ids": s["input_ids"], "attention_mask": torch.ones_like(s["input_ids"]),
         "labels": t["input_ids"]}
        for s, t in zip(sources, targets, strict=True)
    ]  # fmt: skip
    names = [layer.name for layer in select_layers(model, "*.DenseReluDense.w?")]
    found = captured(model, data, names, task=task, batch_size=3)
    for index, x in enumerate(data):
        loss = task.compute_train_loss({k: v[None] for k, v in x.items()}, model)
        for name in names:
            close(found[name, index], weight_gradient(model, name, loss), 1e-5)


class Lora(nn.Module):
    """An adapter as peft's, before its first step: B is zero."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 4, bias=False).to(base.weight)
        self.lora_B = nn.Linear(4, base.out_features, bias=False).to(base.weight)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_that_is_not_trained_yet(tmp_path):
    model, data = Net(plain), sequences(12, 5, 9)
    model.a = Lora(model.a)
    names = ["a.lora_A", "a.lora_B"]
    assert_equal(captured(model, data, names), expected(model, data, names))
    with pytest.warns(UserWarning, match=r"layers a\.lora_A: the gradient of the sampled loss is"):
        factors = fit(model, data, out=tmp_path / "f", layers=names)
    with pytest.warns(UserWarning, match=r"layers a\.lora_A: the gradient of every query is"):
        prepared = prepare_queries(model, factors, data[:1], rank=None)
    scores = score(model, prepared, data, out=tmp_path / "s")
    G = [expected(model, data, ["a.lora_B"])["a.lora_B", i] for i in range(3)]
    P = prepared.preconditioned("a.lora_B")[0]
    close(scores.matrix[0], torch.stack([(P * g).sum() for g in G]), 1e-5)


@pytest.mark.parametrize(
    "change", [torch.relu_, torch.sigmoid_, lambda y: y.mul_(2), lambda y: y.clamp_(min=0.1)]
)
@pytest.mark.parametrize("after", ["a", "b", "both"])
def test_steps_in_place_after_any_layer(change, after):
    def body(net, x):
        h = net.a(x)
        h = change(h) if after != "b" else h
        y = net.b(h + x)
        return change(y) if after != "a" else y

    model, data = Net(body), sequences(12, 5, 9)
    assert_equal(captured(model, data, ["a", "b"]), expected(model, data, ["a", "b"]))


class Turned(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def test_a_step_in_place_on_a_view_of_another_order():
    model, data = Net(lambda net, x: torch.relu_(net.b(torch.relu_(net.a(x))))), sequences(12, 5, 9)
    model.b = Turned(16, 16).double()
    assert_equal(captured(model, data, ["a", "b"]), expected(model, data, ["a", "b"]))


def test_a_text_that_brings_its_own_first_token():
    tokenizer = bpe(bos=True)
    for record in ({"text": "<s>The fox"}, {"prompt": "<s>The", "completion": " fox"}):
        (found,) = tokenize([record], tokenizer, 16)
        assert found["input_ids"].tolist() == tokenizer("The fox")["input_ids"]
    assert found["labels"].tolist()[:2] == [-100, -100]


def test_nulls_in_records_are_named_by_file_and_line(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", '{"text": "a fox"}', '{"text": null}')
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: 'text' is a NoneType, not a string"):
        tokenize(read(path), bpe(), 16)
    path = jsonl(tmp_path / "q.jsonl", '{"prompt": null, "completion": "a fox"}')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: 'prompt' is a NoneType"):
        read_queries(path, bpe(), 16)
    path = jsonl(tmp_path / "n.jsonl", '{"text": "a fox", "name": null}', "null")
    assert "name" not in read(path)[0]
    with pytest.raises(DataError, match=r"n\.jsonl, line 2: holds a NoneType"):
        read(path)[1]


def test_nulls_in_files_of_ours_are_named(tmp_path):
    model, data = gpt2().eval(), corpus()
    prepared = prepare_queries(model, fit(model, data, out=tmp_path / "f"), asked())
    score(model, prepared, data, out=tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    whole = json.loads(path.read_text())
    whole.pop("checksum", None)
    for name in ("facts", "state", "kind", "created"):
        save_json(path, whole | {name: None})
        with pytest.raises(StoreError, match=rf"manifest\.json: {name} is None, expected"):
            Scores(tmp_path / "s")
    save_json(path, whole | {"facts": whole["facts"] | {"train_size": None}})
    with pytest.raises(StoreError, match=r"manifest\.json: train_size is None, expected a whole"):
        Scores(tmp_path / "s")


def test_brackets_in_paths(tmp_path):
    folder = tmp_path / "a [red]b[bold] [0-9]*"
    folder.mkdir()
    texts = jsonl(folder / "c[1].jsonl", *(f'{{"text": "fox {i} over"}}' for i in range(4)))
    data = tokenize(read(folder), bpe(), 16)
    assert data.source(3) == f"{texts}, line 4"
    model = Net(plain)
    model.emb, model.head = nn.Embedding(400, 16).double(), nn.Linear(16, 400).double()
    factors = fit(model, data, out=folder / "f[x]", layers=["a"])
    prepared = prepare_queries(model, factors, data, rank=None, out=folder / "q[?]")
    scores = score(model, prepared, data, out=folder / "s[*]")
    again = score(model, prepared, data, out=folder / "s[*]")
    assert np.array_equal(scores.matrix, again.matrix)
