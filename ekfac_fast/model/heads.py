"""Which rows or columns of an attention matrix are which head's.

q, k and v are rows of the output, heads x head_dim of them, k and v perhaps of fewer heads; the
output matrix (o) reads the heads, by columns. A name says what a matrix is, the configuration how
many heads there are: where its sizes are of another number, nothing is said of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.batches import text_config
from .layers import Layer

Part = Literal["q", "k", "v", "o"]
NAMES: dict[Part, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "value_proj"),
    "o": ("o_proj", "out_proj", "out_lin", "dense", "c_proj"),
}
# All three in one matrix, one after the other; or a head's q, k and v, then the next head's. Others
# go by these names, too, and order their rows otherwise.
FUSED = {"c_attn": ("gpt2", "openai-gpt"), "qkv_proj": ("phi3",)}
BY_HEAD = {"query_key_value": ("gpt_neox", "bloom")}
# The modules that hold an attention's matrices, in the last parts of a layer's name.
ATTENTION = ("attn", "attention", "self_attn", "self_attention")


@dataclass(frozen=True)
class HeadPart:
    """q, k, v or o in a layer: of its output (or input) features, the indices [heads,head_dim]."""

    layer: str
    part: Part
    indices: Tensor

    @property
    def of_input(self) -> bool:
        """Whether heads are columns."""
        return self.part == "o"

    def to(self, device: torch.device) -> "HeadPart":
        """The same, its indices on a device."""
        return replace(self, indices=self.indices.to(device))

    def of(self, each: Tensor) -> Tensor:
        """What features have [n,F] as what heads have [n,heads]."""
        return each[:, self.indices].sum(-1)


def head_parts(model: nn.Module, layers: Sequence[Layer]) -> dict[str, list[HeadPart]]:
    """What heads there are in attention layers, by the layer's name; others have no entry."""
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return {}
    shared = getattr(config, "num_key_value_heads", None)
    kv = shared if isinstance(shared, int) else heads
    found = {}
    for layer in layers:
        own_matrix = layer.expert is None and layer.kind == "linear"
        if own_matrix and (own := _parts(model, config, layer, heads, kv)):
            found[layer.name] = own
    return found


def _parts(model: nn.Module, config: Any, layer: Layer, heads: int, kv: int) -> list[HeadPart]:
    *path, leaf = layer.name.split(".")
    if not any(x in ATTENTION for x in path[-2:]):
        return []
    holder = model.get_submodule(".".join(path))
    size = getattr(holder, "head_dim", None) or getattr(config, "head_dim", None)
    if not isinstance(size, int):
        size = getattr(config, "hidden_size", 0) // heads

    def part(kind: Part, many: int, start: int = 0) -> HeadPart:
        indices = start + torch.arange(many * size).view(many, size)
        return HeadPart(layer.name, kind, indices)

    family = getattr(config, "model_type", None)
    if family in FUSED.get(leaf, ()) and (heads + 2 * kv) * size == layer.O:
        return [
            part("q", heads),
            part("k", kv, heads * size),
            part("v", kv, (heads + kv) * size),
        ]
    if family in BY_HEAD.get(leaf, ()) and 3 * heads * size == layer.O:
        q, k, v = torch.arange(layer.O).view(heads, 3, size).unbind(1)
        return [
            HeadPart(layer.name, "q", q),
            HeadPart(layer.name, "k", k),
            HeadPart(layer.name, "v", v),
        ]
    kind = next((kind for kind, names in NAMES.items() if leaf in names), None)
    if kind is None:
        return []
    many, features = (kv if kind in "kv" else heads), (layer.I if kind == "o" else layer.O)
    return [part(kind, many)] if features == many * size else []
