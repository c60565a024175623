"""Autoencoders: vectors (N, D) <-> latents (N, L). AUTOENCODERS lists them by name, each with its options.

Imports no torch; the modules are in the files beside this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pdiff.method.options import NonNegative, Positive, Rate, Section, TrainingOptions, resolve

if TYPE_CHECKING:
    from torch import nn

    from pdiff.method.log import Log
    from pdiff.method.vectors import Matrix


class AutoencoderOptions(Section):
    """Options of one kind of autoencoder.

    Attributes:
        module: the torch module (or its name as "module:class"), which has `encode`, `decode`, `size` (D),
            `latent_size` (L), and its constructor's arguments as the dict `options`.
    """

    module: ClassVar[Any]

    def fit(self, x: Matrix, *, seed: int, device: Any, log: Log, path: Path | None = None) -> nn.Module:
        """Fit an autoencoder.

        Args:
            x: vectors (N, D).
            seed: of everything random.
            device: where to compute.
            log: receives `autoencoder/loss`.
            path: file of the training state, from which an interrupted fit resumes.

        Returns:
            The module, on the device, in evaluation mode.
        """
        raise NotImplementedError

    def least_parameters(self, size: int) -> int:
        """How many numbers are learned from vectors (N, size), at least; found without building the module."""
        return 0


class PCAOptions(AutoencoderOptions):
    """Principal components: `latent_size` of them; `auto`: as few as explain the share `variance` of the total."""

    module: ClassVar[Any] = "pdiff.method.autoencoders.pca:PCA"

    latent_size: Positive | Literal["auto"] = "auto"
    variance: Annotated[float, Field(gt=0, le=1)] = 0.999

    def fit(self, x: Matrix, *, seed: int, device: Any, log: Log, path: Path | None = None) -> nn.Module:
        from pdiff.method.log import Point

        latent_size = None if self.latent_size == "auto" else self.latent_size
        pca = resolve(self.module).fit(x, latent_size=latent_size, variance=self.variance).to(device).eval()
        log(Point("autoencoder/loss", pca.loss))
        return pca


class ConvAutoencoderOptions(AutoencoderOptions, TrainingOptions):
    """The paper's convolutional autoencoder (method, section 3), with `latent_size` latents.

    In training, vectors get noise of standard deviation `parameter_noise`, and latents of `latent_noise`. With
    `kl_weight` > 0 it is variational: the variance of the latents is learned instead, and `kl_weight` times the mean
    divergence from N(0, 1) is added to the loss.
    """

    module: ClassVar[Any] = "pdiff.method.autoencoders.convolutional:ConvAutoencoder"

    latent_size: Positive | Literal["auto"] = "auto"
    parameter_noise: NonNegative = 0.001
    latent_noise: NonNegative = 0.1
    kl_weight: NonNegative = 0.0
    steps: Positive = 500
    learning_rate: Rate = 2e-5
    batch_size: Positive = 50

    @model_validator(mode="after")
    def _check_latent_size(self) -> ConvAutoencoderOptions:
        if self.latent_size == "auto":
            raise ValueError("latent_size 'auto' needs kind pca; kind conv needs a number, such as 128")
        return self

    def least_parameters(self, size: int) -> int:
        return self.latent_size * (2 * size + self.latent_size)

    def build(self, size: int) -> nn.Module:
        """An untrained autoencoder of vectors (B, size)."""
        return resolve(self.module)(size, self.latent_size, variational=self.kl_weight > 0)

    def fit(self, x: Matrix, *, seed: int, device: Any, log: Log, path: Path | None = None) -> nn.Module:
        import torch

        from pdiff.method.autoencoders.convolutional import trainer
        from pdiff.method.training import follow, shuffled_rows
        from pdiff.method.vectors import dense

        torch.manual_seed(seed)
        autoencoder = self.build(x.shape[1]).to(device)
        steps = trainer(autoencoder, shuffled_rows(dense(x).to(device), self.batch_size, seed), self, seed=seed)
        for _ in follow(steps, "autoencoder/loss", log, path=path):
            pass
        return autoencoder.eval()


AUTOENCODERS: dict[str, type[Section]] = {"pca": PCAOptions, "conv": ConvAutoencoderOptions}
