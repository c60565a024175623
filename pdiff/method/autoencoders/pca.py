"""Principal components as an autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

BLOCK_BYTES = 64 << 20  # of vectors in float64 at a time
ROWS = 64  # vectors that are encoded at a time, so that there is no copy of all of them


class PCA(nn.Module):
    """Principal components: the best linear autoencoder, exact, with nothing to train.

    Args:
        size: D, numbers in a vector.
        latent_size: L, components kept.
    """

    def __init__(self, size: int, latent_size: int) -> None:
        super().__init__()
        self.size, self.latent_size = size, latent_size
        self.options = {"size": size, "latent_size": latent_size}
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("components", torch.zeros(latent_size, size))

    @classmethod
    def fit(cls, x: Tensor, *, latent_size: int | None = None, variance: float = 0.999) -> PCA:
        """Principal components of vectors, from the smaller of the Gram matrix (N, N) and the scatter matrix (D, D).

        Both have the same nonzero eigenvalues; an eigenvector v of the Gram matrix belongs to the component
        v^T X / sqrt(value) ("method of snapshots", Sirovich 1987). Sums are taken in float64, in blocks, so that
        there is no copy of x.

        Args:
            x: vectors (N, D), of any device.
            latent_size: components to keep, at most the rank of x; absent: as few as explain `variance`.
            variance: the share of the total variance to explain, in (0, 1].
        """
        center = x.mean(dim=0)
        wide = x.shape[1] >= x.shape[0]
        blocks = partial(_centered, x, center, axis=1 if wide else 0)
        matrix = x.new_zeros(min(x.shape), min(x.shape), dtype=torch.float64)
        for _, block in blocks():
            matrix += block @ block.T if wide else block.T @ block
            del block  # before the next one needs memory
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        rounding = values[0] * x.shape[1] * torch.finfo(torch.float32).eps ** 2  # of float32 numbers, squared
        rank = max(1, int((values > rounding).sum()))
        if latent_size is None:
            shares = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
            latent_size = int((shares < variance).sum()) + 1
        latent_size = min(latent_size, rank)
        pca = cls(x.shape[1], latent_size).to(x.device)
        pca.center.copy_(center)
        if wide:
            scale = values[:latent_size].clamp(min=1e-30).sqrt()  # of equal checkpoints the one value is 0
            weights = (vectors[:, :latent_size] / scale).T
            for columns, block in blocks():
                pca.components[:, columns] = weights @ block
                del block
        else:
            pca.components.copy_(vectors[:, :latent_size].T)
        return pca

    def residual(self, x: Tensor) -> float:
        """The mean squared error of the reconstruction of vectors (N, D), of any device."""
        batches = (rows.to(self.center) for rows in x.split(ROWS))
        return sum((self(rows) - rows).square().sum(dtype=torch.float64).item() for rows in batches) / x.numel()

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates of vectors (B, D) on the components, (B, L)."""
        return (x - self.center) @ self.components.T

    def decode(self, z: Tensor) -> Tensor:
        """Vectors (B, D) of coordinates (B, L)."""
        return z @ self.components + self.center

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct vectors (B, D)."""
        return self.decode(self.encode(x))


def block_length(shape: torch.Size, axis: int) -> int:
    """How many columns (axis 1) or rows (axis 0) of vectors (N, D) a block holds."""
    return min(shape[axis], max(1, BLOCK_BYTES // (8 * shape[1 - axis])))


def _centered(x: Tensor, center: Tensor, *, axis: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns (axis 1) or rows (axis 0) of x - center, in float64, and where they lie."""
    length = block_length(x.shape, axis)
    for start in range(0, x.shape[axis], length):
        part = slice(start, start + length)
        yield part, ((x[:, part] - center[part]) if axis == 1 else (x[part] - center)).double()
