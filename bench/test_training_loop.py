"""The bench of training loops says what it should, at a small size."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import training_loop


def test_a_table():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    text = training_loop.measured(LlamaForCausalLM(config), 2, 8, 2, 1)
    names = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert names == ["the loop alone", "scores, 2 queries", "covariances"]
    assert torch.is_grad_enabled()
