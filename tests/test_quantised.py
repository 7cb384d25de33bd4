"""Quantised bases: adapters on them are exact, and so are their own layers, as the model runs."""

import re

import peft
import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus
from test_model_families import check, made
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from ekfac_fast import capture, fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError, Notice
from ekfac_fast.model.identity import model_fingerprint
from ekfac_fast.model.layers import parameter_counts, select_layers
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.store.fingerprint import fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear"),
    pytest.mark.filterwarnings("ignore:. of . tracked layers are quantised"),
]
DATA = [example | {"id": i} for i, example in enumerate(corpus(6))]


class Rounded(nn.Linear):
    """W as whole numbers of a scale; no library's."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features, of.bias is not None)
        self.register_buffer("scale", of.weight.detach().abs().max() / 127)
        W = (of.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(W, requires_grad=False), of.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x) * self.scale, self.bias)


def four_bits(of):
    bnb = pytest.importorskip("bitsandbytes")
    bias = of.bias is not None
    made = bnb.nn.Linear4bit(of.in_features, of.out_features, bias, compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(of.weight.data, requires_grad=False, module=made)
    made.bias = of.bias
    return made.to("cpu")


def eight_bits(of):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(
        of.in_features, of.out_features, of.bias is not None, has_fp16_weights=False
    )
    made.weight = bnb.nn.Int8Params(of.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = of.bias
    return made.to("cpu")


def torchao(of, four):
    ao = pytest.importorskip("torchao.quantization")
    how = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4) if four else ao.Int8WeightOnlyConfig()
    ao.quantize_(within := nn.Sequential(of), how)
    return within[0]


KINDS = {
    # How, dtype, and how closely sequences alone and in batches are the same.
    "rounded": (Rounded, torch.float64, 1e-10),
    "bitsandbytes 4": (four_bits, torch.float32, 1e-5),
    # What is read is rounded to fp16, and to 8 bits.
    "bitsandbytes 8": (eight_bits, torch.float32, 5e-3),
    "torchao 8": (lambda of: torchao(of, False), torch.float32, 1e-5),
    "torchao 4": (lambda of: torchao(of, True), torch.float32, 1e-5),
}


@pytest.fixture(params=KINDS)
def quantised(request):
    """A model whose blocks are, and the tolerance."""
    pack, dtype, tolerance = KINDS[request.param]
    model = made("GPTNeoX", "sdpa").to(dtype).requires_grad_(False)
    for name in [n for n, m in model.gpt_neox.layers.named_modules() if isinstance(m, nn.Linear)]:
        model.gpt_neox.layers.set_submodule(name, pack(model.gpt_neox.layers.get_submodule(name)))
    return model.eval(), tolerance


def through(model, layers, example, loss):
    """[O,J] of one example by autograd, of numbers that are added to what a layer multiplies by."""
    deltas, handles = {}, []
    for x in layers:
        of = model.get_input_embeddings().weight
        deltas[x.name] = D = of.new_zeros(x.O, x.J).requires_grad_()
        handles.append(
            model.get_submodule(x.name).register_forward_hook(
                lambda _, args, y, D=D: y + F.linear(args[0], D[:, : args[0].shape[-1]], D[:, -1])
            )
        )
    value = loss(batch_of(example), model)
    for handle in handles:
        handle.remove()
    return dict(zip(deltas, torch.autograd.grad(value, [*deltas.values()]), strict=True))


def test_quantised_layers_are_tracked_as_the_model_runs(quantised, tmp_path):
    model, tolerance = quantised
    layers, task = select_layers(model), LanguageModelTask()
    assert len(layers) == 4
    assert all(x.bias for x in layers)
    how = {"batch_tokens": 60}
    with pytest.warns(Notice, match="4 of 4 tracked layers are quantised"):
        f = fit(model, DATA, out=tmp_path / "f", **how)
    queries = prepare_queries(model, f, asked(2), rank=None, **how)
    found = score(model, queries, DATA, out=tmp_path / "s", **how).matrix
    each = [through(model, layers, example, task.compute_train_loss) for example in DATA]
    P, G = ({x.name: of(x.name) for x in layers} for of in (
        queries.preconditioned, lambda name: torch.stack([one[name] for one in each])
    ))  # fmt: skip
    right = sum(torch.einsum("qoj,boj->qb", P[name], G[name]) for name in P)
    close(found, right, tolerance)
    for number, example in enumerate(asked(2)):
        grads = through(model, layers, example | {"id": number}, task.compute_measurement)
        for x in layers:
            lam = f[x.name].lam.to(torch.float64)
            Qg, Qa = f[x.name].Qg.double(), f[x.name].Qa.double()
            inside = Qg.T @ grads[x.name].double() @ Qa / (lam + 0.1 * lam.mean())
            close(P[x.name][number], Qg @ inside @ Qa.T, 10 * tolerance)
    with pytest.raises(ArgumentError, match=r"parameters: the weight of .* is quantised"):
        queries.parameters(model)


def test_an_adapter_on_a_quantised_base_is_exact(quantised, tmp_path):
    model, tolerance = quantised
    config = peft.LoraConfig(
        r=2, target_modules=["query_key_value", "dense_h_to_4h"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    if tolerance < 1e-6:
        model.double()
    names = check(model, tmp_path, tolerance=10 * tolerance)
    assert len(names) == 8
    assert all(".lora_" in name for name in names)


def test_a_training_loop_on_a_quantised_base(quantised):
    model, _ = quantised
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["dense_h_to_4h"]))
    ids = torch.tensor([DATA[0]["input_ids"]])
    with capture(model, "*.dense_4h_to_h", scale=1.0) as captured:
        model(input_ids=ids, labels=ids).loss.backward()
        found = captured.take_covariances()
    assert all(x.gradient.isfinite().all() and x.gradient.any() for x in found.values())
    assert {x.gradient_tokens for x in found.values()} == {ids.numel()}


def test_quantised_weights_tell_models_apart(quantised):
    model, _ = quantised
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    total = parameter_counts(model, select_layers(model))[1]
    assert total == sum(p.numel() for p in made("GPTNeoX", "sdpa").parameters())
    layers = model.gpt_neox.layers
    one, other = layers[0].mlp.dense_h_to_4h, layers[1].mlp.dense_h_to_4h
    layers[0].mlp.dense_h_to_4h, layers[1].mlp.dense_h_to_4h = other, one
    assert model_fingerprint(model) != before


def test_a_tensor_of_tensors_has_a_fingerprint():
    a, b = torch.arange(4.0), torch.arange(4.0) + 1
    names = {fingerprint(x) for x in (TwoTensor(a, b), TwoTensor(b, a), a, b)}
    assert len(names) == 4
    assert fingerprint(TwoTensor(a, b)) in names


def test_who_is_packed_is_named():
    model = made("GPTNeoX", "sdpa")
    mlp = model.gpt_neox.layers[1].mlp
    mlp.dense_4h_to_h = Rounded(mlp.dense_4h_to_h)
    expected = "1 of 4 tracked layers are quantised (Rounded; the first is gpt_neox.layers.1.mlp"
    with pytest.warns(Notice, match=re.escape(expected)), capture(model):
        pass
