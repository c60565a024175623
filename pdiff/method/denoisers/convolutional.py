"""The paper's denoiser: a 1-D CNN over the entries of a latent (method, section 4)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from pdiff.method.activations import ELU
from pdiff.method.denoisers.embedding import SINUSOIDS, sinusoids

CHANNELS = (1, 64, 128, 256, 512, 256, 128, 64, 1)  # method, section 4
SKIPS = {5: 2, 6: 1, 7: 0}  # input of a convolution <- output of an earlier one, counted from 0 (method, section 4)
KERNEL_SIZE = 7


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
        self.activations = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(c), ELU()) for c in CHANNELS[1:-1])
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
