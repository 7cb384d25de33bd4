"""Matrices that are zero outside of blocks on their diagonal, and products that skip the zeros.

n rows are cut as `numpy.array_split` does: into blocks that differ by one row at most, the larger
ones first. The bias's column is the last of its side, so of its last block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..ops.gradients import rotate_activations


def block_rows(n: int, blocks: int) -> list[slice]:
    """Which rows of n each of the `blocks` has."""
    size, larger = divmod(n, blocks)
    ends = [(i + 1) * size + min(i + 1, larger) for i in range(blocks)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def on_diagonal(kept: Tensor, blocks: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of blocks that are kept side by side in [n, ceil(n / blocks)], as views: row i
    holds its block's columns. One block is the matrix.
    """
    for rows in block_rows(len(kept), blocks):
        yield rows, kept[rows, : rows.stop - rows.start]


def dense(kept: Tensor, blocks: int) -> Tensor:
    """[n,n] of blocks that are kept side by side."""
    if blocks == 1:
        return kept
    return torch.block_diag(*(block for _, block in on_diagonal(kept, blocks)))


@dataclass(frozen=True)
class BlockDiagonal:
    """A matrix [n,n] of its blocks; it multiplies tensors from either side."""

    blocks: tuple[Tensor, ...]

    @classmethod
    def of(cls, matrix: Tensor, blocks: int) -> Self:
        """Copies of the blocks of [n,n]."""
        return cls(
            tuple(matrix[rows, rows].contiguous() for rows in block_rows(len(matrix), blocks))
        )

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, block)."""
        return zip(
            block_rows(sum(map(len, self.blocks)), len(self.blocks)), self.blocks, strict=True
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.blocks[0].device

    @property
    def mT(self) -> Self:
        """Transposed."""
        return self.each(lambda block: block.mT)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change` of every block."""
        return type(self)(tuple(change(block) for block in self.blocks))

    def to(self, *where: Any) -> Self:
        """As `Tensor.to`."""
        return self.each(lambda block: block.to(*where))

    def __matmul__(self, x: Tensor) -> Tensor:
        """Times x [..,n,k]."""
        return torch.cat([block @ x[..., rows, :] for rows, block in self], dim=-2)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """x [..,n] times it."""
        return torch.cat([x[..., rows] @ block for rows, block in self], dim=-1)


Matrix = Tensor | BlockDiagonal


def in_blocks(matrix: Tensor, blocks: int) -> Matrix:
    """A matrix that is zero outside of its blocks, without the zeros; one block is itself."""
    return matrix if blocks == 1 else BlockDiagonal.of(matrix, blocks)


def blocks_in(matrix: Matrix | None) -> Iterator[tuple[slice, Tensor | None]]:
    """(rows, block) of every block; all rows of what has none."""
    if isinstance(matrix, BlockDiagonal):
        yield from matrix
    else:
        yield slice(None), matrix


def rotate(a: Tensor, Qa: Matrix, bias: bool) -> Tensor:
    """(a, 1) Qa without forming the ones column: a [...,I] -> [...,J]."""
    if isinstance(Qa, Tensor):
        return rotate_activations(a, Qa, bias)
    turned = [
        rotate_activations(a[..., rows], block, bias and rows.stop > a.shape[-1])
        for rows, block in Qa
    ]
    return torch.cat(turned, dim=-1)
