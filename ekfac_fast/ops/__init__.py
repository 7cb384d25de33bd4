"""The six ops, each declared once (its card) and run by PyTorch's dispatcher.

`torch.ops.ekfac_fast.<stem>` is the call; `ekfac_fast.ops.<stem>` is the card: equation, shapes,
schema, reference, samples, cost. The reference is registered for every device;
`csrc/cpu/<stem>.cpp` (CPU) and, on a GPU, `csrc/cuda/small.cpp` for small calls and
`triton_kernels/<stem>.py` for the others take over where installed.
Adding an op is one card, one file per tier and one name in `ALL`.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from . import (
    covariance,
    dense_scores,
    eigenvalues,
    low_rank_scores,
    precondition,
    self_influence,
)
from .shapes import Card

ALL: tuple[Card, ...] = (
    covariance,
    eigenvalues,
    precondition,
    self_influence,
    dense_scores,
    low_rank_scores,
)


def stem(card: Card) -> str:
    """The op's name in every folder."""
    return card.__name__.rpartition(".")[2]


def call(card: Card) -> Callable[..., Any]:
    """The dispatched op of a card."""
    return getattr(torch.ops.ekfac_fast, stem(card))


def coverage() -> dict[str, dict[str, bool]]:
    """Which tiers the dispatcher holds for each op: {stem: {"reference", "cpu", "cuda"}}."""
    tiers = {
        "reference": ("", "CompositeExplicitAutograd"),
        "cpu": ("", "CPU"),
        "cuda": ("tiled_", "CUDA"),
    }
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        stem(card): {
            tier: hasattr(torch.ops.ekfac_fast, f"{way}{stem(card)}")
            and has(f"ekfac_fast::{way}{stem(card)}", key)
            for tier, (way, key) in tiers.items()
        }
        for card in ALL
    }


# find_spec decides what is present; what is present and does not load raises.
if find_spec("ekfac_fast._C") is not None:
    importlib.import_module("ekfac_fast._C")
if find_spec("triton") is not None:
    for _card in ALL:
        if find_spec(f"ekfac_fast.triton_kernels.{stem(_card)}") is not None:
            importlib.import_module(f"ekfac_fast.triton_kernels.{stem(_card)}")
