"""The paper's convolutional autoencoder (method, section 3)."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.method.activations import ELU
from pdiff.method.autoencoders import ConvAutoencoderOptions
from pdiff.method.training import Batches, Trainer

ENCODER_CHANNELS = (1, 64, 128, 256, 256, 32)  # method, section 3
DECODER_CHANNELS = (32, 256, 256, 128, 64, 64)
KERNEL_SIZE = 7
STRIDE = 2 ** (len(ENCODER_CHANNELS) - 1)  # D / 32 positions remain after five blocks
PADDING_MULTIPLE = 64  # vectors are zero-padded to a multiple of this (method, section 2)


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
        """The input of the heads for mean and variance, (B, L), of vectors (B, D)."""
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

    def loss(self, x: Tensor, *, parameter_noise: float, latent_noise: float, kl_weight: float = 0.0) -> Tensor:
        """Reconstruction error of noisy vectors (B, D) through noisy latents (method, section 3), a scalar.

        x' = x + parameter_noise eps; z = mean(x') + latent_noise eps; MSE(decode(z), x'). The variational variant
        samples z from the learned Gaussian instead and adds `kl_weight` times its mean divergence from N(0, I).
        """
        x = x + parameter_noise * torch.randn_like(x)
        hidden = self.hidden(x)
        mean = self.mean(hidden)
        if self.log_variance is None:
            return F.mse_loss(self.decode(mean + latent_noise * torch.randn_like(mean)), x)
        log_variance = self.log_variance(hidden)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return F.mse_loss(self.decode(z), x) + kl_weight * divergence


def trainer(autoencoder: ConvAutoencoder, batches: Batches, options: ConvAutoencoderOptions, *, seed: int) -> Trainer:
    """The training of an autoencoder on batches of vectors (B, D)."""
    noise = options.model_dump(include={"parameter_noise", "latent_noise", "kl_weight"})
    loss = partial(autoencoder.loss, **noise)
    return Trainer(autoencoder, loss, batches, options, steps=options.steps, seed=seed, autocast=True)


def _down(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv1d(inputs, outputs, KERNEL_SIZE, stride=2, padding=KERNEL_SIZE // 2)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.LeakyReLU())


def _up(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.ConvTranspose1d(inputs, outputs, KERNEL_SIZE, stride=2, padding=KERNEL_SIZE // 2, output_padding=1)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), ELU())
