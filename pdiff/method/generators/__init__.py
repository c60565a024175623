"""Generators: everything fitted on a collection, and what new networks are sampled from. GENERATORS lists them.

An entry is a class of options with `implementation`, a subclass of `Generator` (pdiff.method.generators.base), and with
`sampling`, the options of one sampling. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from pdiff.method.autoencoders import AUTOENCODERS, PCAOptions
from pdiff.method.denoisers import DENOISERS, DenoiserOptions, MLPOptions
from pdiff.method.objectives import OBJECTIVES, Flow, Objective
from pdiff.method.options import NonNegative, Positive, Rate, Section, TrainingOptions


class SamplingOptions(Section):
    """Options of one sampling: none."""


class GeneratorOptions(Section):
    """What all generators' options have."""

    implementation: ClassVar[Any]
    sampling: ClassVar[type[SamplingOptions]] = SamplingOptions
    extras: ClassVar[tuple[type[Section], ...]] = ()  # further options of the stage that samples
    sections: ClassVar[tuple[str, ...]] = ()  # of a configuration, beside `generator`, that hold its options

    @classmethod
    def of(cls, generator: Section) -> GeneratorOptions:
        """The options in the sections of a configuration."""
        return generator.part(cls)


class DiffusionOptions(TrainingOptions):
    """Training of a denoiser; with `steps` 0 there is none, and latents are sampled from N(0, 1).

    `heldout_fraction` of the checkpoints is kept from the fit; with `patience` > 0 training stops after as many
    evaluations of their loss (every `evaluate_every` steps) without a better one, and keeps the best.
    """

    standardize_latents: bool = True
    steps: Annotated[int, Field(ge=0)] = 1000
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    batch_size: Positive = 128
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    evaluate_every: Positive = 50
    patience: Annotated[int, Field(ge=0)] = 8

    @model_validator(mode="after")
    def _check_patience(self) -> DiffusionOptions:
        if self.patience and not self.heldout_fraction:
            raise ValueError("patience > 0 needs heldout_fraction > 0: early stopping watches held-out checkpoints")
        return self


class DiffusionSampling(SamplingOptions):
    """`sampler: auto` takes the first that can follow the objective; `sampling_steps` are denoiser calls, 0 for all
    timesteps."""

    sampler: str = "auto"
    sampling_steps: Annotated[int, Field(ge=0)] = 20


class TrajectoryOptions(Section):
    """With `trajectory_every` > 0 the first `trajectory_count` samples are also kept as they are on their way from
    noise, after every so many denoiser calls."""

    trajectory_every: Annotated[int, Field(ge=0)] = 0
    trajectory_count: Positive = 16


class LatentDiffusionOptions(GeneratorOptions):
    """Standardise, compress, diffuse (arXiv 2402.13144, section 3): one choice of each part."""

    implementation: ClassVar[Any] = "pdiff.method.generators.latent_diffusion:LatentDiffusion"
    sampling: ClassVar[type[SamplingOptions]] = DiffusionSampling
    extras: ClassVar[tuple[type[Section], ...]] = (TrajectoryOptions,)
    sections: ClassVar[tuple[str, ...]] = ("autoencoder", "diffusion")

    autoencoder: SerializeAsAny[Section] = PCAOptions()
    denoiser: SerializeAsAny[DenoiserOptions] = MLPOptions()
    objective: SerializeAsAny[Objective] = Flow()
    diffusion: DiffusionOptions = DiffusionOptions()

    @classmethod
    def of(cls, generator: Section, *, autoencoder: Any, diffusion: Any) -> LatentDiffusionOptions:
        return cls(
            autoencoder=autoencoder.part(AUTOENCODERS[autoencoder.kind]),
            denoiser=diffusion.part(DENOISERS[diffusion.denoiser]),
            objective=diffusion.part(OBJECTIVES[diffusion.prediction]),
            diffusion=diffusion.part(DiffusionOptions),
        )


class GaussianOptions(GeneratorOptions):
    """A Gaussian with the mean and the covariance of the standardised checkpoints; `scale` multiplies its deviations.

    The covariance lives in PCA space, in as many components as explain the share `variance`; `diagonal`: per parameter,
    without covariances.
    """

    implementation: ClassVar[Any] = "pdiff.method.generators.gaussian:Gaussian"

    scale: NonNegative = 1.0
    diagonal: bool = False
    variance: Annotated[float, Field(gt=0, le=1)] = 1.0


GENERATORS: dict[str, type[GeneratorOptions]] = {
    "latent_diffusion": LatentDiffusionOptions,
    "gaussian": GaussianOptions,
}
