"""peft's adapters: the default is what they are made of, exact against their own gradients."""

import peft
import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2
from test_experts import MIXTRAL
from test_model_families import check, made

from ekfac_fast import LanguageModelTask, fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError, ModelError, Notice
from ekfac_fast.model.identity import model_fingerprint
from ekfac_fast.model.kinds import read
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.linearised import Linearised

# peft asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LLAMA = {"num_key_value_heads": 2}
DRAWN = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.2, "init_lora_weights": False}


def adapted(**more):
    return peft.get_peft_model(made("Llama", **LLAMA), peft.LoraConfig(**DRAWN | more)).eval()


@pytest.mark.parametrize(
    ("more", "count"),
    [
        pytest.param({"target_modules": ["q_proj", "v_proj"]}, 8, id="attention alone"),
        pytest.param({"target_modules": "all-linear"}, 28, id="every layer"),
        pytest.param({"target_modules": ["up_proj"], "use_rslora": True}, 4, id="rsLoRA"),
        pytest.param({"target_modules": ["gate_proj"], "use_dora": True}, 4, id="DoRA"),
        pytest.param(
            {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}, 5, id="a saved module"
        ),
    ],
)
def test_right(more, count, tmp_path):
    model = adapted(**more)
    vectors = {x.name for x in select_layers(model) if x.kind == "vector"}
    names = check(model, tmp_path, ["*.lora_[AB].*"] if vectors else None)
    assert len(names) == count
    assert all(".lora_" in name or "modules_to_save" in name for name in names)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {f"{name}.weight" for name in names} | vectors == trained


def test_the_active_adapters_are_tracked(tmp_path):
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(**DRAWN, target_modules=["v_proj"]))
    assert all("q_proj" in x.name for x in select_layers(model))
    model.set_adapter("other")
    model.eval()
    names = check(model, tmp_path / "other")
    assert len(names) == 4
    assert all(name.endswith(".other") for name in names)
    model.base_model.set_adapter(["default", "other"])
    assert len(check(model, tmp_path / "both")) == 8


def test_an_adapter_of_a_folder_is_frozen_and_tracked_all_the_same(tmp_path):
    adapted(target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(made("Llama", **LLAMA), tmp_path / "adapter")
    assert not [p for p in model.parameters() if p.requires_grad]
    model.double()
    assert len(select_layers(model)) == 8
    fit(model, corpus(4), out=tmp_path / "f")
    assert not [p for p in model.parameters() if p.requires_grad]
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)  # for the truth alone
    assert len(check(model, tmp_path / "c")) == 8


def test_what_is_not_tracked_of_an_adapter_is_said():
    model = adapted(target_modules=["gate_proj", "embed_tokens"])
    with pytest.warns(Notice, match=r"231 parameters of the adapter .*lora_embedding_A"):
        select_layers(model)


def test_an_adapter_on_a_parameter_is_no_layer():
    """peft computes W + BA of it: nothing of it runs as a layer."""
    base = made("Mixtral", **MIXTRAL)
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**DRAWN | {"lora_dropout": 0} | config))
    with pytest.warns(Notice, match="parameters of the adapter are no linear layers"):
        names = [x.name for x in select_layers(model)]
    assert len(names) == 4
    assert all("q_proj.lora_" in name for name in names)


def ia3(base, *targets):
    config = peft.IA3Config(
        target_modules=[*targets],
        feedforward_modules=[targets[-1]],
        fan_in_fan_out="c_attn" in targets,
        init_ia3_weights=False,
    )
    return peft.get_peft_model(base, config).eval()


def dora(base, *targets):
    config = peft.LoraConfig(
        **DRAWN, target_modules=[*targets], use_dora=True, fan_in_fan_out="c_attn" in targets
    )
    model = peft.get_peft_model(base, config).eval()
    for n, p in model.named_parameters():
        p.requires_grad_("magnitude" in n)
        if "magnitude" in n:
            p.data *= 1 + 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize(
    ("adapter", "base", "targets"),
    [
        (adapter, base, targets)
        for adapter in (ia3, dora)
        for base, targets in (
            (lambda: made("Llama", **LLAMA), ("k_proj", "v_proj", "down_proj")),
            # With biases, and weights that lie turned.
            (lambda: gpt2(torch.float64), ("c_attn", "mlp.c_proj")),
        )
    ],
    ids=["Llama, IA3", "GPT-2, IA3", "Llama, DoRA", "GPT-2, DoRA"],
)
def test_vectors(adapter, base, targets, tmp_path):
    model = adapter(base(), *targets)
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    layers = [x for x in select_layers(model) if x.kind == "vector"]
    assert {x.name for x in layers} == held.keys()
    data, queries = ([x | {"id": i} for i, x in enumerate(some)] for some in (corpus(8), asked(2)))
    f = fit(model, data, out=tmp_path / "f", batch_tokens=60, layers=[*held])
    prepared = prepare_queries(model, f, queries, rank=None, batch_tokens=60)
    found = score(model, prepared, data, out=tmp_path / "s", batch_tokens=60).matrix
    task, expected = LanguageModelTask(), 0

    def gradients(examples, loss):
        each = [torch.autograd.grad(loss(batch_of(e), model), [*held.values()]) for e in examples]
        return [torch.stack([x.flatten() for x in of]) for of in zip(*each, strict=True)]

    own = gradients(data, task.compute_train_loss)
    sampled = gradients(data, lambda b, m: task.compute_train_loss(b, m, sample=True))
    measured = gradients(queries, task.compute_measurement)
    for name, G, S, M in zip(held, own, sampled, measured, strict=True):
        lam = S.square().mean(0)
        close(f[name].lam[:, 0], lam, 1e-6)
        expected = expected + M / (lam + 0.1 * lam.mean()) @ G.T
    close(found, expected, 1e-6)
    step = prepared.parameters(model)
    assert {n: x.shape for n, x in step.items()} == {n: p.shape for n, p in held.items()}
    # J^T J of a direction, as refinements ask for it.
    W = {n: torch.randn(1, p.numel(), 1, dtype=p.dtype) for n, p in held.items()}
    got = {n: torch.zeros_like(x) for n, x in W.items()}
    ids = batch_of(data[0])["input_ids"]

    def logits():
        return model(input_ids=ids).logits

    Linearised(model, layers).add_product(lambda: (logits(), lambda v: v), W, got)
    u = torch.zeros_like(logits(), requires_grad=True)
    Ju = torch.autograd.grad((logits() * u).sum(), [*held.values()], create_graph=True)
    along = sum((x.flatten() * W[n].flatten()).sum() for n, x in zip(held, Ju, strict=True))
    (dy,) = torch.autograd.grad(along, u)
    for n, x in zip(
        held, torch.autograd.grad((logits() * dy).sum(), [*held.values()]), strict=True
    ):
        close(got[n].flatten(), x.flatten(), 1e-10)


def test_magnitudes_are_seen_while_the_adapter_trains():
    """With dropout peft computes W x anew."""
    model = dora(made("Llama", **LLAMA), "down_proj").train()
    layer = next(x for x in select_layers(model) if x.kind == "vector")
    module, seen = model.get_submodule(layer.module), {}
    handle = module.register_forward_hook(
        lambda m, args, kwargs, y: seen.update(u=read(layer, m, args, kwargs, y), y=y),
        with_kwargs=True,
    )
    loss = LanguageModelTask().compute_train_loss(batch_of(corpus(1)[0] | {"id": 0}), model)
    handle.remove()
    g, own = torch.autograd.grad(loss, [seen["y"], module.weight])
    close((g * seen["u"]).sum((0, 1)), own, 1e-10)


def test_magnitudes_of_zero_are_refused(tmp_path):
    model = dora(made("Llama", **LLAMA), "down_proj")
    for n, p in model.named_parameters():
        p.data.mul_("magnitude" not in n)
    with pytest.raises(ModelError, match=r"lora_magnitude_vector.* has magnitudes that are zero"):
        fit(model, corpus(4), out=tmp_path / "f", layers=["*magnitude*"])


def test_merged_vectors_of_ia3_are_refused(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = peft.get_peft_model(made("Llama", **LLAMA), config)
    for p in model.parameters():
        p.data.mul_(1.5)
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"ia3_l\.default .*does not multiply by it \(merged"):
        fit(model, corpus(4), out=tmp_path / "f")


def test_a_pass_that_puts_parameters_in_anew_changes_no_model():
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(made("Mixtral", **MIXTRAL), config).eval()
    before, order = model_fingerprint(model), [*model.state_dict()]
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert [*model.state_dict()] != order
    assert model_fingerprint(model) == before


def test_an_adapter_of_other_things_has_no_default():
    config = peft.LoHaConfig(target_modules=["k_proj"])
    model = peft.get_peft_model(made("Llama", **LLAMA), config)
    with pytest.raises(ArgumentError, match=r"an adapter \(loha\) without a layer that can be"):
        select_layers(model)


def test_prompts_that_train_have_no_layer():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(made("Llama", **LLAMA), config)
    with pytest.raises(ArgumentError, match=r"an adapter \(prompt_tuning\) without a layer that"):
        select_layers(model)


@pytest.mark.parametrize(("bias", "said"), [("all", "4 more"), ("lora_only", "base_layer")])
def test_biases_that_train_beside_an_adapter_are_said(bias, said):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias=bias)
    model = peft.get_peft_model(made("Qwen2", **LLAMA), config)
    with pytest.warns(Notice, match=rf"parameters of the adapter .*bias.*{said}"):
        select_layers(model)
