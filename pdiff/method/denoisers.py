"""Denoisers: (noisy latents z_t (B, L), timesteps t (B,)) -> prediction (B, L)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

CHANNELS = (1, 64, 128, 256, 512, 256, 128, 64, 1)  # method, section 4
SKIPS = {5: 2, 6: 1, 7: 0}  # input of a convolution <- output of an earlier one, counted from 0 (method, section 4)
KERNEL_SIZE = 7
SINUSOIDS = 256


def sinusoids(t: Tensor, size: int = SINUSOIDS) -> Tensor:
    """Sinusoidal embedding of timesteps (B,), (B, size): cosines and sines of periods 2 pi .. 2 pi 10 000."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ConvDenoiser(nn.Module):
    """The paper's 1-D CNN over the latent's entries (method, section 4).

    Args:
        latent_size: L.
    """

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.options = {"latent_size": latent_size}
        self.time = nn.Sequential(nn.Linear(SINUSOIDS, latent_size), nn.SiLU(), nn.Linear(latent_size, latent_size))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, KERNEL_SIZE, padding=KERNEL_SIZE // 2) for a, b in pairwise(CHANNELS)
        )
        self.activations = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(c), nn.ELU()) for c in CHANNELS[1:-1])
        self.activations.append(nn.Identity())

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Predict from z (B, L) at timesteps t (B,)."""
        embedding, h, outputs = self.time(sinusoids(t))[:, None], z[:, None], []
        for k, (convolution, activation) in enumerate(zip(self.convolutions, self.activations, strict=True)):
            if k in SKIPS:
                h = h + outputs[SKIPS[k]]
            h = activation(convolution(h + embedding))
            outputs.append(h)
        return h[:, 0]


class MLPDenoiser(nn.Module):
    """A residual MLP, conditioned on t by a shift and a scale in every block.

    Args:
        latent_size: L.
        width: hidden units.
        blocks: residual blocks.
    """

    def __init__(self, latent_size: int, *, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.options = {"latent_size": latent_size, "width": width, "blocks": blocks}
        self.time = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.input = nn.Linear(latent_size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.output = nn.Linear(width, latent_size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Predict from z (B, L) at timesteps t (B,)."""
        h, embedding = self.input(z), self.time(sinusoids(t))
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(h)


class _Block(nn.Module):
    """h + MLP(norm(h) * scale(t) + shift(t))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return h + self.mlp(self.norm(h) * (1 + scale) + shift)
