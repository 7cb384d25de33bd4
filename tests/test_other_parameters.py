"""Embeddings, heads, norms, biases and convolutions as layers: every stage against autograd on the
parameters themselves, one example at a time.
"""

import numpy as np
import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, llama
from plain_tasks import Plain
from small_networks import WIDTH, Net
from test_model_families import made
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from ekfac_fast import LanguageModelTask, fit, prepare_queries, score, self_scores
from ekfac_fast.model.layers import select_layers
from ekfac_fast.store.files import load_tensors


def gradients(model, layers, loss, **more):
    """[O,J] of every layer, by autograd."""
    parameters = [
        [p for n, p in model.get_submodule(x.module).named_parameters(recurse=False)
         if x.parameter in (None, n)]
        for x in layers
    ]  # fmt: skip
    flat = iter(torch.autograd.grad(loss, [p for own in parameters for p in own], **more))
    found = {}
    for x, own in zip(layers, parameters, strict=True):
        W, *b = (next(flat).double() for _ in own)
        linear = isinstance(model.get_submodule(x.module), nn.Linear)
        W = W.unsqueeze(1) if W.ndim == 1 else W if linear else W.T if W.ndim == 2 else W.flatten(1)
        found[x.name] = torch.cat([W, *(x.unsqueeze(1) for x in b)], 1)
    return found


def moments(model, layers, loss_of):
    """A and S of one example's sampled loss, sums over rows, by plain hooks; a vector has one."""
    one = gradients(model, layers, loss_of())
    seen, handles, sums = {}, [], {}
    for x in layers:

        def hook(module, args, output, x=x):
            output.retain_grad()
            seen[x.name] = args[0].detach(), output

        if x.kind == "vector":
            G = one[x.name]
            sums[x.name] = torch.ones(1, 1).double(), G @ G.T
        else:
            handles.append(model.get_submodule(x.module).register_forward_hook(hook))
    loss_of().backward()
    for handle in handles:
        handle.remove()
    for x in (x for x in layers if x.name in seen):
        (a, y), module = seen[x.name], model.get_submodule(x.module)
        g = y.grad
        if x.kind == "embedding":
            # What arrives at rows of the weight: scaled, none at that of a padding token.
            g = g * getattr(module, "embed_scale", 1)
            g = g if module.padding_idx is None else g * (a != module.padding_idx).unsqueeze(-1)
            a = F.one_hot(a, x.I)
        if x.kind == "convolution":
            a, g = patches(module, a), g.flatten(2).mT
        a, g = (t.reshape(-1, t.shape[-1]).double() for t in (a, g))
        a = torch.cat([a, torch.ones(len(a), 1).double()], 1) if x.bias else a
        sums[x.name] = a.T @ a, g.T @ g
    return sums


def patches(module, x):
    """What every position of a convolution's output reads, cut out one by one."""
    k, s, d = module.kernel_size, module.stride, module.dilation
    pads = module._reversed_padding_repeated_twice
    x = F.pad(x, pads, "constant" if module.padding_mode == "zeros" else module.padding_mode)
    sizes = [(n - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i, n in enumerate(x.shape[2:])]
    found = []
    for at in np.ndindex(*sizes):
        here = [slice(p * s[i], p * s[i] + d[i] * (k[i] - 1) + 1, d[i]) for i, p in enumerate(at)]
        found.append(x[(slice(None), slice(None), *here)].flatten(1))
    return torch.stack(found, 1)


def text(example, index, draw=0):
    return batch_of(example | {"id": index}, draw)


def check(model, names, folder, *, data=None, queries=None, alone=text, task=None,
          tolerance=1e-10, shared=False, **more):  # fmt: skip
    """`alone(example, index, draw)` is a batch of one. Returns names and folder."""
    data, queries = data or corpus(6), queries or asked(2)
    task = task or LanguageModelTask()
    layers, more = select_layers(model, names, shared=shared), {"batch_tokens": 60} | more
    if task is not None and not isinstance(task, LanguageModelTask):
        more["batch_tokens"] = None
    more["task"] = task
    f = fit(model, data, out=folder / "f", layers=names, shared_parameters=shared, **more)
    read = lambda name: load_tensors(folder / "f" / f"{name}.safetensors")  # noqa: E731

    def train(i, e, draw=None):
        batch = alone(e, i, draw or 0)
        return task.compute_train_loss(batch, model, sample=draw is not None)

    each = [moments(model, layers, lambda i=i, e=e: train(i, e, 1)) for i, e in enumerate(data)]
    drawn = [gradients(model, layers, train(i, e, 0)) for i, e in enumerate(data)]
    given = [gradients(model, layers, train(i, e)) for i, e in enumerate(data)]
    wanted = [
        gradients(model, layers, task.compute_measurement(alone(e, 0, 0), model)) for e in queries
    ]
    prepared = prepare_queries(model, f, queries, rank=None, **more)
    scores, own = 0, 0
    for x in layers:
        n, Qs = x.name, []
        for at, (side, flat) in enumerate(
            (("activation", x.kind == "embedding"), ("gradient", x.diagonal))
        ):
            cov, count = (
                sum(one[n][at] for one in each),
                int(read(f"num_{side}_covariance_processed")[n]),
            )
            kept, values = read(f"{side}_covariance")[n], read(f"{side}_eigenvalues")[n].double()
            Q = (f[n].Qa, f[n].Qg)[at].double()
            assert Q.ndim == (1 if flat else 2)
            close(kept, cov.diagonal() if flat else cov, tolerance)
            Q = torch.diag(Q) if flat else Q
            found = Q.T @ (cov / count) @ Q
            close(found.diagonal() if flat else found, values if flat else values.diag(), 1e-6)
            Qs.append(Q)
        Qa, Qg = Qs
        lam, G, P = (
            torch.stack([Qg.T @ one[n] @ Qa for one in some]) for some in (drawn, given, wanted)
        )
        lam = lam.square().mean(0)
        close(f[n].lam, lam, tolerance)
        damped = lam + (0.1 * lam.mean()).clamp(min=1e-16)
        close(prepared.preconditioned(n), Qg @ (P / damped) @ Qa.T, tolerance)
        scores += torch.einsum("qoj,boj->qb", P / damped, G)
        own += (G.square() / damped).sum((1, 2))
    found = score(model, prepared, data, out=folder / "s", per_token=True, **more)
    close(found.matrix, scores, tolerance)
    detail = found.details(0)[0]
    assert float(detail.per_token.sum()) == pytest.approx(detail.score, rel=1e-5)
    low = prepare_queries(model, f, queries, rank=100, **more)
    close(score(model, low, data, out=folder / "l", **more).matrix, scores, tolerance)
    close(self_scores(model, f, data, out=folder / "o", **more).matrix[0], own, tolerance)
    return [x.name for x in layers]


SMALL = {"num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("make", "names", "count", "tolerance"),
    [
        pytest.param(gpt2, ["*.ln_1.*", "*.ln_f.*:dense", "*.mlp.c_fc.bias"], 8, 1e-10, id="GPT-2"),
        pytest.param(
            llama, ["model.embed_tokens", "lm_head", "*norm*", "*.o_proj:diagonal"], 9, 1e-6,
            id="Llama",
        ),
        pytest.param(
            lambda _: made("Llama", num_key_value_heads=1),
            ["model.embed_tokens:diagonal", "lm_head:diagonal", "*norm*:dense"], 7, 1e-6,
            id="diagonals, a padding token",
        ),
        pytest.param(
            lambda _: made("Gemma3", tie_word_embeddings=False, **SMALL),
            ["model.embed_tokens", "*.q_norm.*", "*.input_layernorm.weight:dense"], 5, 1e-6,
            id="Gemma: scaled, 1 + w, by head",
        ),
    ],
)  # fmt: skip
def test_language_models(make, names, count, tolerance, tmp_path):
    model = make(torch.float64).eval()
    assert len(check(model, names, tmp_path, tolerance=tolerance)) == count


def test_a_norm_with_a_gate_between_layers_that_share_their_input(tmp_path):
    net = Net(lambda net, x: net.norm(net.a(x), gate=net.b(x)))
    net.norm = Qwen3NextRMSNormGated(WIDTH).double()
    torch.nn.init.normal_(net.norm.weight)
    names = ["norm.weight:dense", "a", "b:diagonal", "head.bias", "emb"]
    assert len(check(net, names, tmp_path, tolerance=1e-6)) == 5


class Classes(Plain):
    """Cross entropy of (input, class); the classes sampled by example and draw."""

    def compute_train_loss(self, batch, model, sample=False):
        x, labels, index = batch
        y = model(x)
        y = getattr(y, "logits", y)
        if sample:
            labels = y.detach().argsort(-1)[torch.arange(len(y)), index % 3]
        return F.cross_entropy(y, labels, reduction="sum")


def net():
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), padding="same", padding_mode="reflect"), nn.Tanh(),
        nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=1, bias=False), nn.Flatten(2),
        nn.Conv1d(4, 5, 3, stride=2, padding=2), nn.Tanh(), nn.Flatten(1), nn.LazyLinear(4),
    )  # fmt: skip


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            image_size=8, patch_size=4, num_channels=2, num_labels=4, attn_implementation="eager",
        )
    )  # fmt: skip


def whisper():
    return WhisperForAudioClassification(
        WhisperConfig(
            d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=12,
            num_mel_bins=6, max_source_positions=4, num_labels=4, classifier_proj_size=8,
            attn_implementation="eager",
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "names", "size", "count"),
    [
        (net, ["0", "2", "4", "7"], (2, 7, 6), 4),
        (vit, ["*projection", "*layernorm*", "classifier:diagonal"], (2, 8, 8), 8),
        (whisper, ["*.conv*", "*.self_attn.q_proj.bias", "*layer_norm*:dense"], (6, 8), 9),
    ],
)
def test_convolutions(make, names, size, count, tmp_path):
    torch.manual_seed(0)
    model = make().double().eval()
    if make is net:
        model(torch.zeros(1, *size).double())
    data = [(torch.randn(size).double(), i % 4, i) for i in range(5)]

    def alone(example, index, draw=0):
        return default_collate([(*example[:2], index)])

    found = check(
        model,
        names,
        tmp_path,
        data=data,
        queries=data[:2],
        alone=alone,
        task=Classes(),
        batch_size=4,
    )
    assert len(found) == count
