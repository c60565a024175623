"""A residual MLP as a denoiser."""

from __future__ import annotations

from torch import Tensor, nn

from pdiff.method.denoisers.embedding import SINUSOIDS, sinusoids


class MLPDenoiser(nn.Module):
    """A residual MLP, conditioned on t by a shift and a scale in every block.

    That is adaptive layer normalisation (Peebles and Xie 2023, arXiv 2212.09748). It begins as the prediction 0.

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
