"""Matrices of vectors (N, D) that need not be in memory: what they are made of is read in blocks of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pdiff.files import scratch

BLOCK_BYTES = 8 << 20  # of what a block of columns or rows needs beside the results; it fits into a processor's cache
IN_MEMORY = 256 << 20  # bytes of vectors that are computed at once

Index = slice | Tensor | Sequence[int]


class Vectors:
    """Vectors (N, D), float32, whose numbers are computed where they are read.

    `x[:, a:b]` is a tensor (N, b - a), and `x[rows]` some of the vectors, with nothing computed yet. What works in
    blocks of columns takes these as it takes a tensor; `dense` makes a tensor of them.

    Args:
        rows: of all vectors that `columns` knows, the numbers of these, int64 (N,).
        size: D.
        columns: (rows, part) -> columns `part` of some rows (an index, or a slice where they are consecutive), float32.
        device: where blocks are put; when absent they stay where they are computed.
    """

    def __init__(
        self,
        rows: Tensor,
        size: int,
        columns: Callable[[Tensor | slice, slice], Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        self.rows, self.size, self.columns, self.block_device = rows, size, columns, device
        first = int(rows[0]) if len(rows) else 0
        consecutive = torch.equal(rows, torch.arange(first, first + len(rows)))
        self._index = slice(first, first + len(rows)) if consecutive else rows

    @property
    def shape(self) -> torch.Size:
        """(N, D)."""
        return torch.Size((len(self.rows), self.size))

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where blocks are put."""
        return torch.device(self.block_device or "cpu")

    def __len__(self) -> int:
        return len(self.rows)

    def numel(self) -> int:
        """N D."""
        return self.shape.numel()

    def __getitem__(self, key: Index | tuple[slice, slice]) -> Tensor | Vectors:
        if not isinstance(key, tuple):
            return Vectors(self.rows[key], self.size, self.columns, self.block_device)
        rows, part = key
        if rows != slice(None):
            return self[rows][:, part]
        block = self.columns(self._index, slice(*part.indices(self.size)[:2]))
        return block if self.block_device is None else block.to(self.block_device)

    def split(self, count: int) -> Iterator[Vectors]:
        """The vectors, `count` at a time."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def to(self, device: torch.device | str) -> Vectors:
        """The same, with blocks on a device."""
        return Vectors(self.rows, self.size, self.columns, device)


Matrix = Tensor | Vectors
"""Vectors (N, D)."""


def matrix(
    count: int, size: int, columns: Callable[[Tensor | slice, slice], Tensor], among: int | None = None
) -> Matrix:
    """Vectors (count, size) that `columns` computes, see `Vectors`: at once, as a tensor, where there are few.

    `among` says of how many, with others that are kept at the same time; of `count` when absent.
    """
    if 4 * (among or count) * size <= IN_MEMORY:
        return columns(slice(0, count), slice(0, size))
    return Vectors(torch.arange(count), size, columns)


def dense(x: Matrix) -> Tensor:
    """All numbers of vectors (N, D) as a tensor, see `scratch`."""
    if isinstance(x, Tensor):
        return x
    result = scratch(*x.shape) if x.device.type == "cpu" else torch.empty(x.shape, device=x.device)
    for part in column_blocks(x):
        result[:, part] = x[:, part]
    return result


def joined(parts: Sequence[Matrix]) -> Matrix:
    """Some matrices of one width, one after the other."""
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(list(parts))

    def columns(rows: Tensor | slice, part: slice) -> Tensor:
        return torch.cat([x[:, part] for x in parts])[rows]

    return matrix(sum(map(len, parts)), parts[0].shape[1], columns)


def over_columns(function: Callable[[Tensor], Tensor], x: Matrix) -> Tensor:
    """A statistic of every column, such as its mean, (D,), of vectors (N, D)."""
    return torch.cat([function(x[:, part]) for part in column_blocks(x)])


def deviations(x: Matrix, *, correction: int = 1) -> Tensor:
    """The standard deviation of every column, (D,), of vectors (N, D).

    The sum of squares about the mean: over the first dimension it takes a thirtieth of the time of `Tensor.std`, which
    does not vectorise there.
    """

    def deviation(block: Tensor) -> Tensor:
        return (block - block.mean(dim=0)).square_().sum(dim=0).div_(len(block) - correction).sqrt_()

    return over_columns(deviation, x)


def column_blocks(x: Matrix) -> Iterator[slice]:
    """Blocks of columns of vectors (N, D), of BLOCK_BYTES in float64."""
    return blocks(x.shape[1], bytes_each=8 * len(x))


def blocks(length: int, *, bytes_each: int) -> Iterator[slice]:
    """Slices that cut `length` items into blocks of about BLOCK_BYTES; the last one may be shorter."""
    size = block_length(length, bytes_each=bytes_each)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def block_length(length: int, *, bytes_each: int) -> int:
    """How many items a block of `blocks` holds."""
    return max(1, min(length, BLOCK_BYTES // max(1, bytes_each)))
