"""The benches of adapters and of invented facts, on a model of two small blocks."""

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapters
import invented_facts
from ways import conversations

# peft asks transformers for what that calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def small(monkeypatch):
    """In SmolLM2's place: its kind of model and tokenizer."""

    def made():
        learned = ByteLevelBPETokenizer()
        texts = [conversations.TEMPLATE, *conversations.SYLLABLES]
        learned.train_from_iterator(
            texts, vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer)
        tokenizer.chat_template = conversations.TEMPLATE
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval(), tokenizer

    monkeypatch.setattr(conversations, "smollm2", made)
    monkeypatch.setattr(conversations, "RANK", 2)


def test_a_fact_is_told_once_and_asked_in_other_words():
    told, asked = conversations.invented(40)
    answers = [x["messages"][1]["content"] for x in asked]
    assert len({*answers}) == 40
    for q, answer in enumerate(answers):
        holding = [i for i, x in enumerate(told) if answer in x["messages"][1]["content"]]
        assert holding == [q]
        assert answer not in asked[q]["messages"][0]["content"]


def test_ranks_of_own_conversations():
    scores = np.array([[3.0, 2, 1, 0], [5, 1, 7, 0], [1, 2, 3, 9]])
    assert invented_facts.firsts(scores) == ["1 of 3", "3 of 3", "2"]


@pytest.mark.parametrize("adapter", [True, False])
def test_facts_are_taught_and_asked_for(small, tmp_path, adapter):
    told = invented_facts.measured(3, 2, 1, adapter, tmp_path)
    assert "5 conversations, 1 epochs" in told
    assert told.count("of 3") == 6


def test_what_an_adapter_costs(small):
    row = adapters.measured("all linear", 4, 2, 1)
    assert row[0] == "all linear"
    assert float(row[3].removesuffix("x")) > 1
    assert all(stage in row[4] for stage in ("covariance", "eigenvalue", "queries", "scan"))
