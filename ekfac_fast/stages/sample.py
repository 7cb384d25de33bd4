"""The examples that eigenvalues are corrected on, where they are not all: evenly spaced ones."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checks import listed, whole
from ..data.batches import Batches
from ..errors import Notice
from ..model.layers import Layer
from ..store.division import Division

FACT = "eigenvalue_examples"


def sample_facts(examples: int | None, size: int) -> dict[str, int]:
    """What `sampled` and `sample_of` read, of a fit on `size` examples; empty for all of them."""
    count = size if examples is None else whole(FACT, examples)
    return {FACT: count} if count < size else {}


def sample_of(facts: Mapping[str, Any] | None) -> int | None:
    """How many examples the eigenvalues of factors with these facts are from; None: all."""
    return (facts or {}).get(FACT)


def sampled(batches: Batches, examples: int) -> Division:
    """Batches of so many examples, the first of them the first: whatever order the corpus has,
    they are of all of it.
    """
    return batches.divided([i * batches.size // examples for i in range(examples)])


def met(layers: Sequence[Layer], lam: Mapping[str, Tensor], examples: int) -> list[Layer]:
    """The layers that gradients of the sample came to; a `Notice` names others: an expert may have
    tokens of the corpus, and none of the sample, and eigenvalues of zero would let it decide all.
    """
    if without := [x.name for x in layers if not lam[x.name].any()]:
        warnings.warn(
            f"no gradient of the {examples:,} examples that eigenvalues are corrected on came to "
            f"{listed(without, 3)}: without eigenvalues, these {len(without)} of {len(layers)} "
            "layers take no part in any score. More eigenvalue_examples may reach them",
            Notice,
            stacklevel=4,
        )
    return [x for x in layers if x.name not in without]
