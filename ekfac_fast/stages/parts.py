"""A layer's rows as the ops take them: all at once, or an expert's without those that are none."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..curvature.basis import Basis, Eigenvectors, SharedRotation
from ..curvature.blocks import rotate as rotated_by
from ..curvature.query_gradients import LowRank, QueryGradients
from ..data.examples import Indexable, named
from ..errors import NotFiniteError
from ..model.layer_batch import LayerBatch
from ..ops.gradients import cheapest_order
from ..ops.shapes import Shape

E = TypeVar("E", bound=Eigenvectors)


def rotated(
    seen: LayerBatch, basis: E, rotate: SharedRotation
) -> Iterator[tuple[Tensor | None, E, Tensor, Tensor, bool]]:
    """(members, basis, g, a, bias) for `Basis`, as `SharedRotation` gives them; of an expert, in
    groups of sequences [b], rotated before where tokens are the cheap side.
    """
    g, a, layer = seen.g, seen.a, seen.layer
    if seen.filled is None:
        basis, a, bias = rotate(basis, g, a, layer.bias, seen.shared, seen.readers)
        yield None, basis, g, a, bias
        return
    groups, bias = list(seen.groups()), layer.bias
    if basis.Qa is not None and basis.Qg is not None and groups:
        rows = sum(len(members) * rows for members, rows in groups)
        some = sum(len(members) for members, _ in groups)
        shape = Shape(B=some, T=-(-rows // some), I=layer.I, O=layer.O, bias=bias)
        if cheapest_order(shape) == "tokens":
            a = seen.spread(rotated_by(seen.tokens(a), basis.Qa.to(a.dtype), bias))
            g = seen.spread(seen.tokens(g) @ basis.Qg.to(g.dtype))
            basis, bias = replace(basis, Qa=None, Qg=None), False
    for members, rows in groups:
        yield members, basis, g[members, :rows], a[members, :rows], bias


def add_scores(s: Tensor, own: QueryGradients, seen: LayerBatch) -> None:
    """s [Q,B] += scores of a layer's batch against queries."""
    g, a, bias = seen.g, seen.a, seen.layer.bias
    if seen.filled is None:
        own.add_scores(s, g, a, bias)
    elif isinstance(own, LowRank):
        # By token, in one sequence, it is the same two products.
        g, a = (seen.tokens(x).unsqueeze(0) for x in (g, a))
        each = s.new_zeros(len(s), 1, g.shape[1])
        own.add_scores(each, g, a, bias)
        s.index_add_(1, seen.filled // seen.g.shape[1], each[:, 0])
    else:
        for members, rows in seen.groups():
            part = s.new_zeros(len(s), len(members))
            own.add_scores(part, g[members, :rows], a[members, :rows], bias)
            s.index_add_(1, members, part)


def add_self_influence(s: Tensor, seen: LayerBatch, basis: Basis, rotate: SharedRotation) -> None:
    """s [B] += self-influence of a layer's batch."""
    for members, here, g, a, bias in rotated(seen, basis, rotate):
        if members is None:
            here.add_self_influence(s, g, a, bias)
        else:
            part = s.new_zeros(len(members))
            here.add_self_influence(part, g, a, bias)
            s.index_add_(0, members, part)


class Tally:
    """Scores [rows,B] of a batch: summed where each layer computes, together on the CPU."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows, self._dtype = rows, dtype
        self._s: dict[torch.device, Tensor] = {}

    def begin(self) -> None:
        """Of a batch, nothing yet."""
        self._s = {}

    def on(self, device: torch.device, B: int) -> Tensor:
        """Those of a device, to add to."""
        if device not in self._s:
            self._s[device] = torch.zeros(self.rows, B, dtype=self._dtype, device=device)
        return self._s[device]

    def total(self, factor: Tensor | float | None = None) -> Tensor:
        """The sum, times a factor."""
        scaled = (
            x if factor is None else x * torch.as_tensor(factor, device=x.device)
            for x in self._s.values()
        )  # fmt: skip
        first, *others = (x.cpu() for x in scaled)
        return sum(others, start=first)


def check_scores(s: Tensor, dataset: Indexable, indices: Sequence[int]) -> None:
    """Refuse scores [...,Q,B] of a batch that are not finite.

    Raises:
        NotFiniteError: names the first example and its query.
    """
    if bool(s.isfinite().all()):
        return
    *_, q, b = where = (~s.isfinite()).nonzero()[0].tolist()
    raise NotFiniteError(
        f"the score of {named(dataset, indices[b])} for query {q} is {s[tuple(where)].item()}: its "
        "gradient overflowed, or is NaN where the loss is not. Look at the example, or leave it out"
    )
