"""Vectors (B, D) <-> latents (B, L): the paper's convolutional autoencoder, and principal components."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.parallel.ranks import own

ENCODER_CHANNELS = (1, 64, 128, 256, 256, 32)  # method, section 3
DECODER_CHANNELS = (32, 256, 256, 128, 64, 64)
KERNEL_SIZE = 7
STRIDE = 2 ** (len(ENCODER_CHANNELS) - 1)  # D / 32 positions remain after five blocks
PADDING_MULTIPLE = 64  # vectors are zero-padded to a multiple of this (method, section 2)
GRAM_BLOCK = 1 << 20  # columns that the Gram matrix takes at a time


class ConvAutoencoder(nn.Module):
    """The paper's autoencoder (method, section 3), on any D: vectors are zero-padded on the way in.

    Args:
        size: D, numbers in a vector.
        latent_size: L.
        variational: learn the variance of the latents, too (the `vae_sample` variant).
    """

    def __init__(self, size: int, latent_size: int, *, variational: bool = False) -> None:
        super().__init__()
        self.size, self.latent_size = size, latent_size
        self.options = {"size": size, "latent_size": latent_size, "variational": variational}
        self.padding = -size % PADDING_MULTIPLE
        length = (size + self.padding) // STRIDE
        flat = length * ENCODER_CHANNELS[-1]
        self.encoder = nn.Sequential(*(_down(a, b) for a, b in pairwise(ENCODER_CHANNELS)), nn.Flatten())
        self.to_latent = nn.Linear(flat, latent_size)
        self.mean = nn.Linear(latent_size, latent_size)
        self.log_variance = nn.Linear(latent_size, latent_size) if variational else None
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, flat),
            nn.Unflatten(1, (DECODER_CHANNELS[0], length)),
            *(_up(a, b) for a, b in pairwise(DECODER_CHANNELS)),
            nn.Conv1d(DECODER_CHANNELS[-1], 1, KERNEL_SIZE, padding=KERNEL_SIZE // 2),
            nn.Flatten(),
        )

    def hidden(self, x: Tensor) -> Tensor:
        """What the heads for mean and variance read, (B, L)."""
        return self.to_latent(self.encoder(F.pad(x, (0, self.padding)).unsqueeze(1)))

    def encode(self, x: Tensor) -> Tensor:
        """Latent means of vectors (B, D), (B, L)."""
        return self.mean(self.hidden(x))

    def decode(self, z: Tensor) -> Tensor:
        """Vectors (B, D) of latents (B, L)."""
        return self.decoder(z)[:, : self.size]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct vectors (B, D)."""
        return self.decode(self.encode(x))

    def loss(
        self,
        x: Tensor,
        *,
        parameter_noise: float,
        latent_noise: float,
        kl_weight: float = 0.0,
        count: int | None = None,
    ) -> Tensor:
        """Reconstruction error of noisy vectors through noisy latents (method, section 3), a scalar.

        x' = x + parameter_noise eps; z = mean(x') + latent_noise eps; MSE(decode(z), x'). The variational variant
        draws z from the learned Gaussian instead and adds `kl_weight` times its mean divergence from N(0, I).
        Where several processes share a batch of `count` rows, x are those of this one.
        """
        x = x + parameter_noise * own(torch.randn, x, count)
        hidden = self.hidden(x)
        mean = self.mean(hidden)
        if self.log_variance is None:
            return F.mse_loss(self.decode(mean + latent_noise * own(torch.randn, mean, count)), x)
        log_variance = self.log_variance(hidden)
        z = mean + (0.5 * log_variance).exp() * own(torch.randn, mean, count)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return F.mse_loss(self.decode(z), x) + kl_weight * divergence


def _down(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv1d(inputs, outputs, KERNEL_SIZE, stride=2, padding=KERNEL_SIZE // 2)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.LeakyReLU())


def _up(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.ConvTranspose1d(inputs, outputs, KERNEL_SIZE, stride=2, padding=KERNEL_SIZE // 2, output_padding=1)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.ELU())


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
        """Principal components by the Gram trick: (N, N) eigenvectors instead of (D, D), exact for N < D.

        Args:
            x: vectors (N, D).
            latent_size: components to keep, at most the rank of x; absent: as few as explain `variance`.
            variance: the share of the total variance to explain, in (0, 1].
        """
        center = x.mean(dim=0)
        gram = torch.zeros(len(x), len(x), dtype=torch.float64)
        for block, middle in zip(x.split(GRAM_BLOCK, dim=1), center.split(GRAM_BLOCK), strict=True):
            centered = (block - middle).double()
            gram += centered @ centered.T
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        rounding = values[0] * x.shape[1] * torch.finfo(torch.float32).eps ** 2  # of float32 numbers, squared
        rank = max(1, int((values > rounding).sum()))
        if latent_size is None:
            shares = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
            latent_size = int((shares < variance).sum()) + 1
        latent_size = min(latent_size, rank)
        pca = cls(x.shape[1], latent_size)
        pca.center.copy_(center)
        weights = (vectors[:, :latent_size] / values[:latent_size].clamp(min=1e-30).sqrt()).T
        pca.components.copy_(weights @ (x - center).double())
        return pca

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates of vectors (B, D) on the components, (B, L)."""
        return (x - self.center) @ self.components.T

    def decode(self, z: Tensor) -> Tensor:
        """Vectors (B, D) of coordinates (B, L)."""
        return z @ self.components + self.center

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct vectors (B, D)."""
        return self.decode(self.encode(x))
