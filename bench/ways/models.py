"""Whole models that stages are timed on: real shapes, random weights, one random batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ekfac_fast.model.layers import Layer, select_layers

MODELS = {
    "gpt2": {"model_type": "gpt2"},
    "pythia-1b": {
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
}
SMOKE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


@dataclass(frozen=True)
class Setting:
    """One model made real, and the sizes of its batch."""

    name: str
    model: nn.Module
    layers: list[Layer]
    blocks: tuple[int, int]  # built, of how many
    batch: dict[str, Tensor]
    queries: int
    rank: int

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.batch["input_ids"].numel()

    def inputs(self, stage: str) -> dict[str, Tensor]:
        """The batch of a stage: of queries the second half of a sequence is the completion."""
        labels = self.batch["labels"]
        if stage == "queries":
            prompt = torch.arange(labels.shape[1], device=labels.device) < labels.shape[1] // 2
            labels = labels.masked_fill(prompt, -100)
        return self.batch | {"labels": labels}

    @property
    def shape(self) -> dict[str, int]:
        """What a row tells of it."""
        sequences, tokens = self.batch["input_ids"].shape
        built, whole = self.blocks
        return {
            "blocks": built,
            "all_blocks": whole,
            "sequences": sequences,
            "tokens": tokens,
            "queries": self.queries,
            "rank": self.rank,
        }


def build(
    name: str,
    *,
    blocks: int | None,
    smoke: bool,
    sizes: tuple[int, int, int, int],
    device: torch.device,
) -> Setting:
    """A model with random weights made on the device, and a random batch; sizes as in `start`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[name] | (SMOKE if smoke else {}))
    whole = config.num_hidden_layers
    config.num_hidden_layers = min(blocks or whole, whole)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    B, T, Q, K = sizes
    ids = torch.randint(config.vocab_size, (B, T), device=device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "index": torch.arange(B, device=device),
    }
    blocks = config.num_hidden_layers, whole
    name += " (smoke)" * smoke
    return Setting(name, model, select_layers(model), blocks, batch, Q, K)
