"""What the rows of a layer stand for: which sequence of the batch, and which position of it.

Most layers see [B,T,F]. Others see tokens as rows, [B*T,F] (OPT), positions first, [T,B,F], or one
row a sequence, [B,F]. Where a shape leaves it open, or a model or task is a user's own (of classes
there may be as many as examples), the layer is run on two examples in one order and in the other:
the axis along which its input is swapped holds the sequences.

An example may be several sequences (a pair: what is preferred and what is not), which follow one
another in the batch. Its rows are those of all of them, one sequence after the other: from here on
it is one sequence, with one gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ModelError


@dataclass(frozen=True)
class Grid:
    """A batch: how many sequences, and of how many positions with padding (None: not known).

    `before`: positions that a model adds before the text (virtual tokens of prompt tuning);
    `sides`: how many sequences each example is; `alone`: a forward pass of one of them.
    """

    sequences: int
    positions: int | None = None
    before: int = 0
    sides: int = 1
    alone: Callable[[int], Any] | None = field(default=None, compare=False)

    def folded(self, x: Tensor) -> Tensor:
        """Rows by sequence [S,rows,F] as rows by example, [S / sides, sides * rows, F]."""
        return x if self.sides == 1 else x.unflatten(0, (-1, self.sides)).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class Rows:
    """Row t of sequence b in a [B, uses * positions, F] is position t % positions of b.

    A layer that runs several times in a pass has the rows of all its uses, one after the other. An
    example of several sequences is one here; its positions are those of all `sides`.
    `before` of the positions come before the text. An expert has the rows that are routed to it:
    of row t of sequence b it is `places` [B,rows] that says the position, -1 where there is none;
    `counts` of every sequence come first, `filled` [N] in the flat [B * rows] (None: they do not).
    """

    sequences: int
    positions: int
    uses: int = 1
    before: int = 0
    places: Tensor | None = None
    counts: tuple[int, ...] | None = None
    filled: Tensor | None = None
    sides: int = 1

    def same(self, other: "Rows") -> bool:
        """Whether rows stand for the same."""
        mine, its = ((x.sequences, x.positions, x.uses, x.before) for x in (self, other))
        return mine == its and self.places is other.places

    def folded(self, s: Tensor, sequences: Tensor) -> Tensor:
        """[n,rows] -> [n,positions]: what is said of every row of these sequences [n], by
        position.
        """
        if self.places is not None:
            # Of rows that are none it says zero.
            places = self.places[sequences].clamp(min=0)
            return s.new_zeros(len(s), self.positions).scatter_add_(1, places, s)
        return s.unflatten(-1, (self.uses, self.positions)).sum(-2) if self.uses > 1 else s

    def real(self, mask: Tensor) -> Tensor | None:
        """The real rows, flat [B * uses * positions], by a mask [B,T]; None where it has no say.

        Positions are those of the mask, or `before` more, which come before it and are real. Of
        others (patches, further streams) only those of one sequence without padding are known.
        """
        if mask.ndim != 2 or len(mask) != self.sequences:
            return None
        mask, before = mask.bool(), self.positions - mask.shape[-1]
        if before not in (0, self.before):
            if self.sequences > 1 or not bool(mask.all()):
                return None
            mask = mask.new_ones(1, self.positions)
        elif before:
            mask = torch.nn.functional.pad(mask, (before, 0), value=True)
        if self.places is not None:
            return (mask.gather(1, self.places.clamp(min=0)) & (self.places >= 0)).flatten()
        return mask.repeat(1, self.uses).flatten()


# Of the longest in a group, how many rows the others have at least; fewer rows are no group alone.
ALIKE, WORTHWHILE = 0.8, 32


def alike(counts: Sequence[int]) -> list[list[int]]:
    """Sequences that have some rows, in groups of about as many: little of a group is padding."""
    order = sorted((b for b, count in enumerate(counts) if count), key=lambda b: -counts[b])
    left = sum(counts)
    groups: list[list[int]] = []
    for b in order:
        if not groups or (counts[b] < ALIKE * counts[groups[-1][0]] and left >= WORTHWHILE):
            groups.append([])
        groups[-1].append(b)
        left -= counts[b]
    return groups


@dataclass(frozen=True)
class Layout:
    """The axis of [..., F] that holds the sequences: alone ("whole"), or together with positions,
    sequence by sequence ("outer") or position by position ("inner"); then `rows` of each example
    were seen there.
    """

    axis: int
    kind: Literal["whole", "outer", "inner"]
    rows: int = 1

    def fits(self, leading: tuple[int, ...], grid: Grid) -> bool:
        """Whether a tensor of these leading sizes can hold a batch so.

        Together with positions it holds all of them: in a model that drops padding every sequence
        has as many rows as real tokens.
        """
        if self.axis >= len(leading):
            return False
        size = leading[self.axis]
        if grid.positions is None:
            return size == grid.sequences * self.rows
        positions = grid.before + grid.positions
        together = self.kind != "whole" and size % (grid.sequences * positions) == 0
        return together or size == grid.sequences

    def by_sequence(self, x: Tensor, B: int) -> Tensor:
        """[..., F] -> [B, rows, F]."""
        axis = self.axis
        if self.kind == "outer":
            x = x.unflatten(axis, (B, -1))
        elif self.kind == "inner":
            x, axis = x.unflatten(axis, (-1, B)), axis + 1
        return x.movedim(axis, 0).reshape(B, -1, x.shape[-1])


# What puts every example in a batch of its own, of a language model and of any other.
ONE_BY_ONE = {True: "batch_tokens=1", False: "batch_size=1"}


def trusted(leading: tuple[int, ...], grid: Grid) -> Layout | None:
    """The layout that the sizes alone leave no doubt about, or None."""
    B, T = grid.sequences, grid.positions
    first = Layout(0, "whole")
    if not leading or leading[0] != B:
        return None
    if T is None:
        return first if all(size != B for size in leading[1:]) else None
    if len(leading) == 1:
        return first if T == 1 else None
    if leading == (B, T) and B != T:
        return first
    return first if all(size % B for size in leading[1:]) else None


def arranged(
    name: str, x: Tensor, features: int, grid: Grid | None, layout: Layout | None
) -> Tensor:
    """A layer's input or gradient as [S,rows,F]; without a grid the first axis is sequences.

    Raises:
        ModelError: it is no [...,F], or the layout is not known or does not fit; names the layer.
    """
    if x.ndim < 2 or x.shape[-1] != features:
        raise ModelError(
            f"layer {name}: a tensor of shape {list(x.shape)}, expected [B,T,{features}]"
        )
    if grid is None or grid.sequences == 1:
        return x.reshape(x.shape[0] if grid is None else 1, -1, features)
    if layout is None or not layout.fits(tuple(x.shape[:-1]), grid):
        raise ModelError(
            f"layer {name}: a tensor of shape {list(x.shape)} for {grid.sequences} sequences of "
            f"{grid.positions} positions; which rows belong to which sequence cannot be told. Give "
            f"{ONE_BY_ONE[grid.positions is not None]}, so that each is alone in its batch"
        )
    return layout.by_sequence(x, grid.sequences)


def probed(
    name: str,
    one: Tensor | None,
    other: Tensor | None,
    shape: list[int],
    expected: Layout | None = None,
) -> Layout:
    """The layout by which the input for (x, y) is that for (y, x), swapped; of several the
    `expected` one.

    Raises:
        ModelError: there is none, or more than one that differ.
    """
    found: list[tuple[Layout, Tensor]] = []
    if one is not None and other is not None and one.shape == other.shape:
        for layout in _candidates(tuple(one.shape[:-1])):
            there, back = layout.by_sequence(one, 2), layout.by_sequence(other, 2)
            if torch.allclose(there.flip(0), back, rtol=1e-3, atol=1e-5, equal_nan=True):
                found.append((layout, there))
    if expected is not None and any(layout == expected for layout, _ in found):
        return expected
    if not found or any(not torch.equal(there, found[0][1]) for _, there in found[1:]):
        why = "several ways fit" if found else "no axis of it holds the sequences of a batch"
        raise ModelError(
            f"layer {name}: its input is {shape}, and which rows belong to which sequence cannot "
            f"be told ({why}); leave it out of `layers`, or give {ONE_BY_ONE[True]} (of other than "
            f"text {ONE_BY_ONE[False]}), so that every example is alone in its batch"
        )
    return found[0][0]


def _candidates(leading: tuple[int, ...]) -> Iterator[Layout]:
    """Every way to find two sequences in a tensor of these sizes."""
    for axis, size in enumerate(leading):
        if size == 2:
            yield Layout(axis, "whole")
        elif size % 2 == 0 and size:
            yield Layout(axis, "outer", size // 2)
            yield Layout(axis, "inner", size // 2)
