"""Principal components as an autoencoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pdiff.files import scratch
from pdiff.method.vectors import Matrix, Vectors, blocks, column_blocks, dense, matrix, over_columns

ROWS = 64  # vectors that are encoded at a time, so that there is no copy of all of them


class PCA(nn.Module):
    """Principal components: the best linear autoencoder, exact, with nothing to train.

    Args:
        size: D, numbers in a vector.
        latent_size: L, components kept.

    Attributes:
        loss: after `fit`, the mean squared error of the reconstructions of the vectors, else NaN.
    """

    loss: float = math.nan

    def __init__(self, size: int, latent_size: int) -> None:
        super().__init__()
        self.size, self.latent_size = size, latent_size
        self.options = {"size": size, "latent_size": latent_size}
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("components", torch.empty(latent_size, size))

    @classmethod
    def fit(cls, x: Matrix, *, latent_size: int | None = None, variance: float = 0.999) -> PCA:
        """Principal components of vectors, from the smaller of the Gram matrix (N, N) and the scatter matrix (D, D).

        Both have the same nonzero eigenvalues; an eigenvector v of the Gram matrix belongs to the component
        v^T X / sqrt(value) ("method of snapshots", Sirovich 1987). Sums are taken in float64, in blocks, so that
        there is no copy of x; large components lie in a scratch file.

        Args:
            x: vectors (N, D), of any device.
            latent_size: components to keep, at most the rank of x; absent: as few as explain `variance`.
            variance: the share of the total variance to explain, in (0, 1].
        """
        wide = x.shape[1] >= x.shape[0]
        center = torch.empty(x.shape[1], device=x.device)
        products = torch.zeros(min(x.shape), min(x.shape), dtype=torch.float64, device=x.device)
        if wide:
            for part in column_blocks(x):
                block = x[:, part].double()
                center[part] = block.mean(dim=0).float()
                block -= center[part]
                products.addmm_(block, block.T)
                del block  # before the next one needs memory
        else:
            center = over_columns(lambda block: block.mean(dim=0), x)
            for part in blocks(len(x), bytes_each=8 * x.shape[1]):
                block = (dense(x[part]) - center).double()
                products.addmm_(block.T, block)
                del block
        values, vectors = torch.linalg.eigh(products)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        rounding = values[0] * x.shape[1] * torch.finfo(torch.float32).eps ** 2  # of float32 numbers, squared
        rank = max(1, int((values > rounding).sum()))
        if latent_size is None:
            shares = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
            latent_size = int((shares < variance).sum()) + 1
        latent_size = min(latent_size, rank)
        pca = cls(x.shape[1], latent_size)
        pca.center = center
        pca.loss = values[latent_size:].sum().item() / x.numel()  # what the components leave
        if wide:
            scale = values[:latent_size].clamp(min=1e-30).sqrt()  # of equal checkpoints the one value is 0
            weights = (vectors[:, :latent_size] / scale).T
            if x.device.type == "cpu":
                pca.components = scratch(latent_size, x.shape[1])
            else:
                pca.to(x.device)
            for part in column_blocks(x):
                block = (x[:, part] - center[part]).double()
                pca.components[:, part] = weights @ block
                del block
        else:
            pca.components = vectors[:, :latent_size].T.float().contiguous()
        return pca

    def encode(self, x: Matrix) -> Tensor:
        """Coordinates of vectors (B, D) on the components, (B, L)."""
        if isinstance(x, Vectors):
            parts = ((part, x[:, part] - self.center[part]) for part in column_blocks(x))
            return sum(block @ self.components[:, part].T for part, block in parts)
        return (x - self.center) @ self.components.T

    def decode(self, z: Tensor) -> Tensor:
        """Vectors (B, D) of coordinates (B, L)."""
        return z @ self.components + self.center

    def vectors(self, z: Tensor) -> Matrix:
        """As `decode`; many of them are not in memory, and computed where they are read."""

        def columns(rows: Tensor | slice, part: slice) -> Tensor:
            return z[rows] @ self.components[:, part] + self.center[part]

        return matrix(len(z), self.size, columns)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct vectors (B, D)."""
        return self.decode(self.encode(x))
