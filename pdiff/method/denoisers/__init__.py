"""Denoisers: (noisy latents z_t (B, L), timesteps t (B,)) -> prediction (B, L). DENOISERS lists them.

Imports no torch; the modules are in the files beside this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from pdiff.method.options import Positive, Section, resolve

if TYPE_CHECKING:
    from torch import nn


class DenoiserOptions(Section):
    """Options of one kind of denoiser.

    Attributes:
        module: the torch module (or its name as "module:class"); its constructor takes L and the options, and it keeps
            its constructor's arguments as the dict `options`.
    """

    module: ClassVar[Any]

    def build(self, latent_size: int) -> nn.Module:
        """An untrained denoiser of latents (B, latent_size)."""
        return resolve(self.module)(latent_size, **self.model_dump())

    def least_parameters(self, latent_size: int) -> int:
        """How many numbers the module learns, at least; found without building it."""
        return 0


class MLPDenoiserOptions(DenoiserOptions):
    """A residual MLP with `blocks` blocks of `width` hidden units."""

    module: ClassVar[Any] = "pdiff.method.denoisers.mlp:MLPDenoiser"

    width: Positive = 256
    blocks: Positive = 3

    def least_parameters(self, latent_size: int) -> int:
        return self.width * (2 * latent_size + self.width * (4 * self.blocks + 1))


class ConvDenoiserOptions(DenoiserOptions):
    """The paper's 1-D CNN (method, section 4), which has no options."""

    module: ClassVar[Any] = "pdiff.method.denoisers.convolutional:ConvDenoiser"

    def least_parameters(self, latent_size: int) -> int:
        return latent_size**2


class GraphDenoiserOptions(Section):
    """A transformer over the units of a network: `blocks` blocks of nodes of a `width`, with attention of so many
    `heads`, and edges of a width `edge_width` between the units of neighbouring layers. It needs tokens, and is none of
    DENOISERS, which take any latents."""

    width: Positive = 128
    blocks: Positive = 4
    heads: Positive = 4
    edge_width: Positive = 32

    @model_validator(mode="after")
    def _check_heads(self) -> GraphDenoiserOptions:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, but got ({self.heads}, {self.width})")
        return self


DENOISERS: dict[str, type[DenoiserOptions]] = {"mlp": MLPDenoiserOptions, "conv": ConvDenoiserOptions}
