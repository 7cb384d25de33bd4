"""Harness: tiny models and corpora; dense EK-FAC by the definitions, from per-sample gradients."""

import copy

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ekfac_fast.model.tasks import LanguageModelTask

VOCABULARY, CONTEXT = 61, 24


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=CONTEXT,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=40, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def corpus(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(0, VOCABULARY, rng.integers(4, 20)).tolist()} for _ in range(n)
    ]


def asked(n=3, seed=1):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        ids = rng.integers(0, VOCABULARY, 10).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
    return examples


def batch_of(examples, draw=0):
    """One example alone, without padding; sampled labels are the `draw`-th of it."""
    if "input_ids" not in examples:
        return default_collate([{k: x for k, x in examples.items() if k != "id"}])
    ids = torch.tensor([examples["input_ids"]])
    labels = torch.tensor([examples.get("labels", examples["input_ids"])])
    fields = {k: torch.tensor([examples[k]]) for k in ("position_ids",) if k in examples}
    return fields | {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "index": torch.tensor([examples["id"]]),
        "draw": draw,
    }


def weight_gradient(model, name, loss):
    """[O,J] by autograd on the parameters themselves: no hook of ours."""
    if name not in dict(model.named_modules()):
        return _expert_gradient(model, name, loss)
    module = model.get_submodule(name)
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    weight, *bias = torch.autograd.grad(loss, parameters, retain_graph=True)
    weight = weight if isinstance(module, nn.Linear) else weight.T
    return torch.cat([weight, *(b.unsqueeze(1) for b in bias)], 1)


def _expert_gradient(model, name, loss):
    """Of one slice of parameters [E,O,I] or [E,I,O] and [E,O]."""
    parameter, e = name.rsplit(".", 1)
    held = dict(model.named_parameters())
    parameters = [held[n] for n in (parameter, f"{parameter}_bias") if n in held]
    weight, *bias = (g[int(e)] for g in torch.autograd.grad(loss, parameters, retain_graph=True))
    # GPT-OSS and Llama 4 keep their experts transposed.
    module = model.get_submodule(parameter.rpartition(".")[0])
    turned = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
    weight = weight.T if turned else weight
    return torch.cat([weight, *(b.unsqueeze(1) for b in bias)], 1)


def moments(model, names, batch, task):
    """Inputs [T,J] and output gradients [T,O] of one sequence's sampled loss, by plain hooks.

    `names` may map each name to those of all modules with its parameters.
    """
    seen, handles = {name: [] for name in names}, []
    modules = names if isinstance(names, dict) else {name: (name,) for name in names}
    for name, module in ((n, m) for n, every in modules.items() for m in every):

        def hook(module, args, output, name=name):
            output.retain_grad()
            seen[name].append((args[0].detach(), output, module.bias is not None))

        handles.append(model.get_submodule(module).register_forward_hook(hook))
    loss = task.compute_train_loss(batch, model, sample=True)
    loss.backward()
    for handle in handles:
        handle.remove()
    rows = {}
    for name, uses in seen.items():
        a, g = (
            torch.cat([x.reshape(-1, x.shape[-1]) for x in side])
            for side in ([a for a, _, _ in uses], [output.grad for _, output, _ in uses])
        )
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if uses[0][2] else a
        rows[name] = (a, g)
    return loss, rows


def eigenvectors(covariance, blocks=1):
    """In columns, of blocks on the diagonal."""
    rows = np.array_split(np.arange(len(covariance)), blocks)
    return torch.block_diag(*(torch.linalg.eigh(covariance[r][:, r])[1] for r in rows))


def dense_ekfac(model, names, data, queries, damping=None, task=None, autocast=None, blocks=1):
    """Scores [Q,N], self scores [N] and lam by the definitions, one sequence at a time.

    All in fp64; with `autocast`, the gradients that are scored are of passes in that dtype.
    """
    passes = copy.deepcopy(model).float() if autocast else model.double()
    model = model.double()
    task = task or LanguageModelTask()
    data = [example | {"id": i} for i, example in enumerate(data)]
    A, S, lam = ({} for _ in range(3))
    tokens = sum(len(e.get("input_ids", "1")) for e in data)
    for example in data:
        _, rows = moments(model, names, batch_of(example, draw=1), task)
        for name, (a, g) in rows.items():
            A[name] = A.get(name, 0) + a.T @ a / tokens
            S[name] = S.get(name, 0) + g.T @ g / tokens
    Q = {n: (eigenvectors(A[n], blocks), eigenvectors(S[n], blocks)) for n in names}
    for example in data:
        # The eigenvalues' labels are another draw than those of the covariances.
        loss = task.compute_train_loss(batch_of(example), model, sample=True)
        for n in names:
            rotated = Q[n][1].T @ weight_gradient(model, n, loss) @ Q[n][0]
            lam[n] = lam.get(n, 0) + rotated**2 / len(data)
    size = {
        n: (0.1 * lam[n].mean()).clamp(min=1e-16) if damping is None else damping for n in names
    }

    def inverse(n, G):
        Qa, Qg = Q[n]
        return Qg @ ((Qg.T @ G @ Qa) / (lam[n] + size[n])) @ Qa.T

    def gradients(example, measure):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = measure(batch_of(example), passes)
        return {n: weight_gradient(passes, n, loss).double() for n in names}

    train = [gradients(e, task.compute_train_loss) for e in data]
    ask = [gradients(e | {"id": 0}, task.compute_measurement) for e in queries]
    scores = [[sum((inverse(n, q[n]) * g[n]).sum() for n in names) for g in train] for q in ask]
    own = [sum((inverse(n, g[n]) * g[n]).sum() for n in names) for g in train]
    return torch.tensor(scores), torch.tensor(own), lam


def close(got, expected, tolerance):
    got = got if isinstance(got, torch.Tensor) else torch.tensor(np.array(got))
    got, expected = got.double(), expected.double()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"
