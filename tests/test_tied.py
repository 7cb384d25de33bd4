"""A head tied to its embedding, tracked as the one parameter that it is, through every stage."""

import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, llama, weight_gradient

from ekfac_fast import LanguageModelTask, fit, prepare_queries, score, self_scores
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.linearised import Linearised
from ekfac_fast.store.files import load_tensors

HEAD = "lm_head"


def tied(dtype=torch.float64):
    model = llama(dtype).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("make", [lambda: gpt2(torch.float64).eval(), tied])
def test_scores_are_those_of_the_one_parameter(make, tmp_path):
    model, data, queries, task = make(), corpus(8), asked(2), LanguageModelTask()
    factors = fit(model, data, out=tmp_path / "f", layers=[HEAD], shared_parameters=True)
    Qa, Qg = factors[HEAD].Qa, factors[HEAD].Qg
    alone = {"layers": [HEAD], "shared_parameters": True, "batch_tokens": 1}
    padded, unpadded = (
        load_tensors(x.folder / "gradient_covariance.safetensors")[HEAD]
        for x in (factors, fit(model, data, out=tmp_path / "g", **alone))
    )
    close(padded, unpadded, 1e-6)

    def gradient(example, index, loss=task.compute_train_loss, **more):
        return weight_gradient(model, HEAD, loss(batch_of(example | {"id": index}), model, **more))

    drawn = [gradient(x, i, sample=True) for i, x in enumerate(data)]
    lam = sum((Qg.T @ G @ Qa) ** 2 for G in drawn) / len(data)
    close(factors[HEAD].lam, lam, 1e-6)  # Llama norms in fp32
    damped = lam + 0.1 * lam.mean()
    G = torch.stack([gradient(x, i) for i, x in enumerate(data)])
    P = torch.stack([
        Qg @ ((Qg.T @ gradient(x, 0, task.compute_measurement) @ Qa) / damped) @ Qa.T
        for x in queries
    ])  # fmt: skip
    prepared = prepare_queries(model, factors, queries, rank=None)
    close(prepared.preconditioned(HEAD), P, 1e-6)  # queries are kept in fp32
    scores = score(model, prepared, data, out=tmp_path / "s", per_token=True)
    close(scores.matrix, torch.einsum("qoj,noj->qn", P, G), 1e-6)
    first = scores.details(0)[0]
    assert first.per_token.shape == (len(data[first.index]["input_ids"]),)
    assert first.per_token.sum() == pytest.approx(first.score, rel=1e-6)
    own = self_scores(model, factors, data, out=tmp_path / "o")
    close(own.matrix[0], ((Qg.T @ G @ Qa).square() / damped).sum((1, 2)), 1e-6)


def test_its_products_with_the_gauss_newton_matrix():
    model, (example, *_) = tied(), corpus(1)
    task, inputs = LanguageModelTask(), batch_of(example | {"id": 0})
    dW = torch.randn(2, 61, 16, dtype=torch.float64)
    got = torch.zeros_like(dW)
    Linearised(model, select_layers(model, [HEAD], shared=True)).add_product(
        lambda: task.linear_outputs(inputs, model), {HEAD: dW}, {HEAD: got}
    )

    def logits(W):
        weights = {"lm_head.weight": W, "model.embed_tokens.weight": W}
        return torch.func.functional_call(model, weights, (inputs["input_ids"],)).logits[0, :-1]

    W = model.lm_head.weight.detach()
    for direction, product in zip(dW, got, strict=True):
        z, dz = torch.func.jvp(logits, (W,), (direction,))
        p = z.softmax(-1)
        u = p * dz - p * (p * dz).sum(-1, keepdim=True)
        close(product, torch.func.vjp(logits, W)[1](u)[0], 1e-6)


def test_passes_in_bf16(tmp_path):
    model, data = tied(torch.float32), corpus(8)
    arguments = {"layers": [HEAD], "shared_parameters": True}
    rough = fit(model, data, out=tmp_path / "r", autocast=torch.bfloat16, **arguments)
    prepared = prepare_queries(model, rough, asked(2), rank=4, autocast=torch.bfloat16)
    scores = score(model, prepared, data, out=tmp_path / "s", autocast=torch.bfloat16)
    exact = score(model, prepared, data, out=tmp_path / "t")
    close(scores.matrix, torch.tensor(exact.matrix[:]), 0.03)
