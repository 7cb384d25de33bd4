"""peft's adapters: the default is what they are made of, exact against their own gradients."""

import peft
import pytest
from dense_ekfac import corpus
from test_experts import MIXTRAL
from test_model_families import check, made

from ekfac_fast import fit
from ekfac_fast.errors import ArgumentError, Notice
from ekfac_fast.model.layers import select_layers

# peft asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LLAMA = {"num_key_value_heads": 2}
DRAWN = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.2, "init_lora_weights": False}


def adapted(**more):
    return peft.get_peft_model(made("Llama", **LLAMA), peft.LoraConfig(**DRAWN | more)).eval()


@pytest.mark.filterwarnings("ignore:48 parameters of the adapter are no linear layers")
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
    names = check(model, tmp_path)
    assert len(names) == count
    assert all(".lora_" in name or "modules_to_save" in name for name in names)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {f"{name}.weight" for name in names} == {n for n in trained if "magnitude" not in n}


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
    model = adapted(target_modules=["gate_proj"], use_dora=True)
    with pytest.warns(Notice, match=r"48 parameters of the adapter .*lora_magnitude_vector"):
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


def test_an_adapter_of_vectors_has_no_default(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = peft.get_peft_model(made("Llama", **LLAMA), config)
    with pytest.raises(ArgumentError, match=r"an adapter \(ia3\) without a linear layer"):
        fit(model, corpus(4), out=tmp_path / "f")
