"""Autoencoders: vectors (N, D) <-> latents (N, L). AUTOENCODERS lists them by name, each with its options.

An entry is a class of options with `module`, a torch module that has `encode`, `decode`, `size` (D), `latent_size` (L)
and `options` (its constructor's arguments), and with `fit`, which makes one of vectors. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pdiff.method.options import NonNegative, Positive, Rate, Section, TrainingOptions, resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pdiff.method.log import Log


class PCAOptions(Section):
    """Principal components: `latent_size` of them; `auto`: as few as explain the share `variance` of the total."""

    module: ClassVar[Any] = "pdiff.method.autoencoders.pca:PCA"

    latent_size: Positive | Literal["auto"] = "auto"
    variance: Annotated[float, Field(gt=0, le=1)] = 0.999

    def fit(self, x: Tensor, *, seed: int, device: Any, log: Log, path: Path | None = None) -> nn.Module:
        """The principal components of vectors (N, D), in evaluation mode; logs the residual as `autoencoder/loss`."""
        from pdiff.method.log import Point

        latent_size = None if self.latent_size == "auto" else self.latent_size
        pca = resolve(self.module).fit(x, latent_size=latent_size, variance=self.variance).to(device).eval()
        log(Point("autoencoder/loss", pca.residual(x.to(device))))
        return pca


class ConvOptions(TrainingOptions):
    """The paper's convolutional autoencoder (method, section 3), variational where `kl_weight` > 0."""

    module: ClassVar[Any] = "pdiff.method.autoencoders.convolutional:ConvAutoencoder"

    latent_size: Positive | Literal["auto"] = "auto"
    parameter_noise: NonNegative = 0.001
    latent_noise: NonNegative = 0.1
    kl_weight: NonNegative = 0.0
    steps: Positive = 500
    learning_rate: Rate = 2e-5
    batch_size: Positive = 50

    @model_validator(mode="after")
    def _check_latent_size(self) -> ConvOptions:
        if self.latent_size == "auto":
            raise ValueError("latent_size 'auto' needs kind pca; kind conv needs a number, such as 128")
        return self

    def fit(self, x: Tensor, *, seed: int, device: Any, log: Log, path: Path | None = None) -> nn.Module:
        """An autoencoder trained on vectors (N, D), in evaluation mode; resumes from `path`."""
        from pdiff.method.autoencoders import convolutional
        from pdiff.method.training import follow, shuffled_rows

        autoencoder = convolutional.initialised(x.shape[1], self, seed=seed).to(device)
        batches = shuffled_rows(x.to(device), self.batch_size, seed)
        for _ in follow(
            convolutional.trainer(autoencoder, batches, self, seed=seed), "autoencoder/loss", log, path=path
        ):
            pass
        return autoencoder.eval()


AUTOENCODERS: dict[str, type[Section]] = {"pca": PCAOptions, "conv": ConvOptions}
