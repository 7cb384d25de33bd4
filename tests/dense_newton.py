"""Harness: the Gauss-Newton matrix by its definition, from whole Jacobians; tasks that tell their
outputs; models that compute in fp64 throughout.
"""

import pytest
import torch
import transformers
from dense_ekfac import CONTEXT, VOCABULARY, batch_of, gpt2, llama
from torch import nn
from torch.nn import functional as F

from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.tasks import LanguageModelTask


def experts(dtype=torch.float32):
    """A mixture of experts, routed and shared."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=12, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0,
        max_position_embeddings=CONTEXT, attn_implementation="eager",
    )  # fmt: skip
    made = transformers.Qwen2MoeForCausalLM._from_config(config, experts_implementation="eager")
    return made.to(dtype)


@pytest.fixture
def in_fp64(monkeypatch):
    """Norms and softmaxes that are fp32 whatever the model is compute in the model's dtype."""
    softmax = F.softmax

    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def same(x, dim=None, dtype=None, **_):
        return softmax(x, dim)

    monkeypatch.setattr(F, "softmax", same)
    for module in ("llama.modeling_llama.Llama", "qwen2_moe.modeling_qwen2_moe.Qwen2Moe"):
        name = f"transformers.models.{module}RMSNorm"
        monkeypatch.setattr(f"{name}.forward", norm)


class Regression:
    """Of [B,T,I], a number a position: squared error, summed. `sign` of an example are the labels'
    deviations when they are sampled, in place of random ones.
    """

    def compute_outputs(self, batch, model):
        return model(batch[0])

    def compute_output_loss(self, outputs, batch):
        return F.mse_loss(outputs, batch[1], reduction="sum")

    def compute_train_loss(self, batch, model, sample=False):
        outputs = self.compute_outputs(batch, model)
        if not sample:
            return self.compute_output_loss(outputs, batch)
        # The variance of a label that squared error stands for is 1/2.
        return (outputs - outputs.detach() - batch[2] * 0.5**0.5).square().sum()

    def compute_measurement(self, batch, model):
        return model(batch[0]).sum()

    def get_influence_tracked_modules(self):
        return ["all"]

    def get_attention_mask(self, batch):
        return None


class Classification(Regression):
    """Cross-entropy of classes."""

    def compute_output_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1], reduction="sum")

    def compute_train_loss(self, batch, model, sample=False):
        outputs = self.compute_outputs(batch, model)
        drawn = torch.multinomial(outputs.detach().softmax(-1), 1)[:, 0]
        return F.cross_entropy(outputs, drawn if sample else batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_output_loss(model(batch[0]), batch)


def mlp(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def regression(n=12):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 3, dtype=torch.float64, generator=rng)
    signs = torch.randn(n, 2, 2, dtype=torch.float64, generator=rng).sign()
    return mlp(2), Regression(), [(r, r[:, :2].sin(), s) for r, s in zip(x, signs, strict=True)]


def classification(n=12):
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return mlp(4), Classification(), [(r, int(i) % 4) for i, r in enumerate(x)]


def language(make):
    def made(n=3):
        rng = torch.Generator().manual_seed(3)
        ids = [torch.randint(0, VOCABULARY, (t,), generator=rng).tolist() for t in (4, 3, 5)[:n]]
        data = [{"input_ids": x} for x in ids]
        data[-1]["labels"] = [-100, -100, *data[-1]["input_ids"][2:]]
        return make(torch.float64), LanguageModelTask(), data

    return made


MADE = {
    "GPT-2": language(gpt2), "Llama": language(llama), "experts": language(experts),
    "regression": regression, "classification": classification,
}  # fmt: skip


def jacobian(model, layers, y):
    """dy / dW of all layers end to end, [y, sum of O J], by autograd on the parameters."""
    eye = torch.eye(y.numel(), dtype=y.dtype).view(y.numel(), *y.shape)
    parts = []
    for layer in layers:
        if layer.expert is not None:
            parameter = model.get_parameter(layer.name.rpartition(".")[0])
            (rows,) = torch.autograd.grad(
                y, parameter, eye, is_grads_batched=True, retain_graph=True
            )
            parts.append(rows[:, layer.expert].flatten(1))
            continue
        module = model.get_submodule(layer.name)
        own = [p for p in (module.weight, module.bias) if p is not None]
        rows = torch.autograd.grad(y, own, eye, is_grads_batched=True, retain_graph=True)
        W = rows[0] if isinstance(module, nn.Linear) else rows[0].mT
        parts.append(torch.cat([W, *(b.unsqueeze(-1) for b in rows[1:])], -1).flatten(1))
    return torch.cat(parts, 1)


def outputs_of(model, task, example, index):
    """(y, loss of y) of one example alone; of a language model all logits that predict."""
    if isinstance(task, LanguageModelTask):
        batch = batch_of(example | {"id": index})
        labels = batch["labels"][0, 1:]
        y = model(input_ids=batch["input_ids"]).logits[0, :-1][labels >= 0]
        return y, lambda z: F.cross_entropy(z, labels[labels >= 0], reduction="sum")
    batch = tuple(torch.as_tensor(part)[None] for part in example)
    return task.compute_outputs(batch, model), lambda z: task.compute_output_loss(z, batch)


def gauss_newton(model, task, data, layers):
    """1/N sum of J^T H J, dense, [D,D]."""
    total = 0
    for index, example in enumerate(data):
        y, loss = outputs_of(model, task, example, index)
        J = jacobian(model, layers, y)
        H = torch.autograd.functional.hessian(loss, y.detach()).view(y.numel(), y.numel())
        total = total + J.mT @ H @ J
    return total / len(data)


def flat(vectors, layers):
    """[Q,D] of a stack of matrices a layer."""
    return torch.cat([vectors[x.name].flatten(1) for x in layers], 1)


def chosen(model, name):
    """The layers of a model of `MADE` that are tracked."""
    wanted = {"experts": ["mlp", "*.q_proj"], "Llama": ["*.mlp.*", "*.v_proj"]}
    return select_layers(model, wanted.get(name, ["mlp"] if "-" in name else ["all"]))
