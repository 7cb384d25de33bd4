"""Which layers are meant: defaults are what they say, names beat keywords, no choice is empty."""

import pytest
import transformers as T
from dense_ekfac import gpt2, llama
from torch import nn
from typer.testing import CliRunner

from ekfac_fast import Factors, LanguageModelTask, fit
from ekfac_fast.cli import app
from ekfac_fast.errors import ArgumentError
from ekfac_fast.model.layers import select_layers

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TEXT = {"vocab_size": 97, "num_key_value_heads": 2, "max_position_embeddings": 64}


def names(model, patterns=None):
    return [layer.name for layer in select_layers(model, patterns)]


def test_a_layer_of_that_name_comes_before_a_keyword():
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4), "all": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert names(model, ["mlp"]) == ["mlp"]
    assert names(model, "all") == ["all"]


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**SMALL, **TEXT, num_local_experts=4)), 8),
        (
            lambda: T.Qwen2MoeForCausalLM(
                T.Qwen2MoeConfig(**SMALL, **TEXT, num_experts=4, moe_intermediate_size=24,
                                 shared_expert_intermediate_size=24)
            ),
            8 + 3,
        ),
    ],
)  # fmt: skip
def test_routed_and_shared_experts_are_the_default_without_routers(model, count):
    model = model()
    default = names(model)
    assert len(default) == count
    assert all("expert" in name for name in default)
    assert not any("gate" in name.split(".")[-2:] for name in default)
    assert names(model, "*.self_attn.?_proj") == [
        f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"
    ]


def test_a_vision_tower_is_left_out_of_text(tmp_path):
    config = T.Gemma3Config(
        text_config={**SMALL, **TEXT, "head_dim": 8},
        vision_config={**SMALL, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94,
    )  # fmt: skip
    model = T.Gemma3ForConditionalGeneration(config).eval()
    chosen = names(model)
    assert len(chosen) == 3
    assert not any("vision" in name for name in chosen)
    factors = fit(model, [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}], out=tmp_path)
    assert factors.keys() == {*chosen}


def test_the_frozen_base_of_an_adapter_is_no_default():
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    model = llama()
    model.requires_grad_(False)
    assert len(names(model)) == 6  # all are frozen: nobody has chosen
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, Lora(getattr(block.mlp, name)))
    chosen = names(model)
    assert len(chosen) == 12
    assert all(".lora_" in name for name in chosen)


def test_the_share_of_the_parameters_is_told(tmp_path):
    model = gpt2().eval()
    factors = fit(model, [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}], out=tmp_path / "f")
    mlps = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert Factors(factors.folder).share == mlps / sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--sequences", "8"])
    assert f"{mlps:,} parameters, {factors.share:.0%} of the model's" in done.output


def test_an_empty_choice_is_an_error(tmp_path):
    class Nothing(LanguageModelTask):
        def get_influence_tracked_modules(self):
            return []

    data = [{"input_ids": [1, 2, 3]}]
    for choice in ({"layers": []}, {"task": Nothing()}):
        with pytest.raises(ArgumentError, match="layers: the list is empty"):
            fit(gpt2(), data, out=tmp_path, **choice)
    with pytest.raises(ArgumentError, match="the model has none at all"):
        select_layers(nn.Embedding(3, 4), "mlp")
