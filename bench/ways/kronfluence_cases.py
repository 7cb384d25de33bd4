"""Models, data and arguments of `against_kronfluence.py`: GPTs, an MLP; shapes with their reason.

small-gpt   24 linears with attention; eight queries in batches of four: two passes, plain
gpt2-mlp    the MLP matrices of GPT-2's 124M parameters, the paper's choice of layers; 128 tokens,
            or 512 in gpt2-mlp-512, which is left out unless asked for
mlp         regression: one row per example, T = 1
gpu-*       kronfluence's low-precision preset; only with a GPU
"""

# ruff: noqa: D102 (the methods are those of torch and of kronfluence's Task)

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kronfluence import FactorArguments, ScoreArguments, Task
from kronfluence.utils.common.factor_arguments import all_low_precision_factor_arguments
from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import data


class Block(nn.Module):
    """A pre-norm transformer block with separate projections, all with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        read = self.norms[0](x)
        q, k, v = (
            layer(read).view(B, T, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(B, T, width))
        return x + self.proj(F.gelu(self.fc(self.norms[1](x))))


class GPT(nn.Module):
    """GPT-2's shape, with Linear where Hugging Face has Conv1D."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, tokens: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, weight in self.named_parameters():
            # As in GPT-2; with larger embeddings the tied head is certain and all gradients are 0.
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "proj" not in name else 0.02 / layers**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


class NextToken(Task):
    """Summed next-token loss; labels sampled from the model for the factors."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        ids, _ = batch
        logits = model(ids)[:, :-1].flatten(0, 1).float()
        labels = ids[:, 1:].flatten()
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: tuple, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules

    def get_attention_mask(self, batch: tuple) -> Tensor:
        return batch[1]


class Regression(Task):
    """Summed squared error; labels sampled N(output, 1) for the factors."""

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        output = model(x)
        y = output.detach() + torch.randn_like(output) if sample else y
        return (output - y).square().sum() / 2

    def compute_measurement(self, batch: tuple, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


@dataclass(frozen=True)
class Case:
    """A model, its data and the arguments of both sides."""

    name: str
    model: Callable[[], nn.Module]
    task: Task
    train: data.Dataset
    query: data.Dataset
    train_batch: int
    query_batch: int
    factor_args: FactorArguments
    score_args: ScoreArguments
    rank: int = 32
    per_token: bool = True


def gpt_case(
    name: str,
    *,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    tokens: int,
    sizes: tuple[int, int],
    batches: tuple[int, int],
    attention: bool,
    low_precision: bool = False,
) -> Case:
    tracked = ("q", "k", "v", "o", "fc", "proj") if attention else ("fc", "proj")
    modules = [f"blocks.{i}.{layer}" for i in range(layers) for layer in tracked]

    def texts(size: int) -> data.Dataset:
        return data.TensorDataset(
            torch.randint(vocabulary, (size, tokens)), torch.ones(size, tokens, dtype=torch.long)
        )

    return Case(
        name,
        lambda: GPT(layers, width, heads, vocabulary, tokens),
        NextToken(modules),
        texts(sizes[0]),
        texts(sizes[1]),
        *batches,
        all_low_precision_factor_arguments() if low_precision else FactorArguments(),
        all_low_precision_score_arguments() if low_precision else ScoreArguments(),
        rank=min(32, width // 2),
        per_token=not low_precision,
    )


def mlp_case(width: int, sizes: tuple[int, int], batches: tuple[int, int]) -> Case:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    train, query = (data.TensorDataset(torch.randn(n, 32), torch.randn(n, 1)) for n in sizes)
    factor_args, score_args = FactorArguments(), ScoreArguments()
    return Case(
        "mlp", model, Regression(), train, query, *batches, factor_args, score_args, per_token=False
    )


def cases(smoke: bool) -> dict[str, Callable[[], Case]]:
    """All cases, each built when it is its turn; `smoke` shrinks them to seconds."""
    gpt2 = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257}
    if smoke:
        gpt2 = {"layers": 2, "width": 48, "heads": 2, "vocabulary": 97}
    small = {"layers": 4, "width": 256, "heads": 4, "vocabulary": 512}
    small = {**small, "layers": 2, "width": 32} if smoke else small
    llama = {"layers": 4, "width": 2048, "heads": 16, "vocabulary": 32000}
    return {
        "small-gpt": lambda: gpt_case(
            "small-gpt",
            **small,
            tokens=16 if smoke else 128,
            sizes=(8, 4) if smoke else (64, 8),
            batches=(4, 2) if smoke else (16, 4),
            attention=True,
        ),
        "gpt2-mlp": lambda: gpt_case(
            "gpt2-mlp",
            **gpt2,
            tokens=16 if smoke else 128,
            sizes=(4, 2) if smoke else (16, 4),
            batches=(4, 2) if smoke else (8, 4),
            attention=False,
        ),
        "gpt2-mlp-512": lambda: gpt_case(
            "gpt2-mlp-512",
            **gpt2,
            tokens=24 if smoke else 512,
            sizes=(4, 2) if smoke else (16, 4),
            batches=(2, 2) if smoke else (4, 4),
            attention=False,
        ),
        "mlp": lambda: mlp_case(
            *((16, (32, 8), (8, 4)) if smoke else (256, (2048, 128), (256, 32)))
        ),
        "gpu-gpt2": lambda: gpt_case(
            "gpu-gpt2",
            **gpt2,
            tokens=512,
            sizes=(256, 32),
            batches=(16, 16),
            attention=False,
            low_precision=True,
        ),
        "gpu-llama": lambda: gpt_case(
            "gpu-llama",
            **llama,
            tokens=512,
            sizes=(128, 32),
            batches=(8, 8),
            attention=True,
            low_precision=True,
        ),
    }
