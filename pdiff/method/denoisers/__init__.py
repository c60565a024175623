"""Denoisers: (noisy latents z_t (B, L), timesteps t (B,)) -> prediction (B, L). DENOISERS lists them.

An entry is a class of options with `module`, a torch module whose constructor takes L and the options; the module keeps
its constructor's arguments in `options`. Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pdiff.method.options import Positive, Section, resolve

if TYPE_CHECKING:
    from torch import nn


class DenoiserOptions(Section):
    """What all denoisers' options have."""

    module: ClassVar[Any]

    def build(self, latent_size: int) -> nn.Module:
        """An untrained denoiser of latents (B, latent_size)."""
        return resolve(self.module)(latent_size, **self.model_dump())


class MLPOptions(DenoiserOptions):
    """A residual MLP with `blocks` blocks of `width` hidden units."""

    module: ClassVar[Any] = "pdiff.method.denoisers.mlp:MLPDenoiser"

    width: Positive = 256
    blocks: Positive = 3


class ConvOptions(DenoiserOptions):
    """The paper's 1-D CNN (method, section 4)."""

    module: ClassVar[Any] = "pdiff.method.denoisers.convolutional:ConvDenoiser"


DENOISERS: dict[str, type[DenoiserOptions]] = {"mlp": MLPOptions, "conv": ConvOptions}
