"""Generators: fitted on a collection, and sampled to get new networks. GENERATORS lists them, each with its options.

Imports no torch; `base` has the protocol, and the files beside it have one kind each.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pdiff.method.autoencoders import AUTOENCODERS, PCAOptions
from pdiff.method.denoisers import DENOISERS, DenoiserOptions, GraphDenoiserOptions, MLPDenoiserOptions
from pdiff.method.log import names_of_measured
from pdiff.method.objectives import OBJECTIVES, Flow, Objective
from pdiff.method.options import NonNegative, Positive, Rate, Section, Several, TrainingOptions


class SamplingOptions(Section):
    """Options of `Generator.sample`: none."""


class GeneratorOptions(Section):
    """Options of one kind of generator.

    Attributes:
        implementation: a subclass of `Generator` (pdiff.method.generators.base), or its name as "module:class".
        sampling: the options of its `sample`.
        extras: further options of the stage that samples.
        sections: of a configuration that hold its options, beside `generator` where that is not named, each with the
            options that it has whatever else is chosen; without any, `generator` has all fields of this class.
        settles: choices of those sections that it makes itself.
        needs: what `fit` must know of the networks beside the collection: `groups`.
        columns: of the description of the population, whose values `fit` takes as `conditions`.
        logs: the metrics that `fit` and `sizes` may log; a sweep looks at no others.
    """

    implementation: ClassVar[Any]
    sampling: ClassVar[type[SamplingOptions]] = SamplingOptions
    extras: ClassVar[tuple[type[Section], ...]] = ()
    sections: ClassVar[dict[str, tuple[type[Section], ...]]] = {}
    settles: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    logs: ClassVar[tuple[str, ...]] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """What `fit` must be given beside the collection, with these options."""
        return (*self.needs, *(["conditions"] if self.columns else []))

    @classmethod
    def of(cls, generator: Section) -> GeneratorOptions:
        """The options in the section `generator` of a configuration and in its `sections`, which are given by name."""
        return generator.part(cls)


class DiffusionOptions(TrainingOptions):
    """Training of a denoiser; with `steps` 0 there is none, and latents are sampled from N(0, 1).

    `standardize_latents` gives every entry of the latents mean 0 and deviation 1 over the collection, before diffusion.
    `ema` is the decay of the moving average of the weights, with which latents are sampled; 0 for none.
    `heldout_fraction` of the checkpoints is not trained on. Every `evaluate_every` steps the loss on them is measured,
    and a few latents are sampled, to see how far they spread, and how near they come to fitted ones.
    `stop_on` ends the training early: `heldout_loss` after `patience` evaluations without a better loss, with the best
    weights; `memorising` as soon as samples are copies of fitted latents, with the weights of the evaluation before;
    `none` never, so that all steps are run and the last weights kept.
    """

    standardize_latents: bool = True
    steps: Annotated[int, Field(ge=0)] = 1000
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    batch_size: Positive = 128
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    evaluate_every: Positive = 50
    stop_on: Literal["heldout_loss", "memorising", "none"] = "heldout_loss"
    patience: Annotated[int, Field(ge=0)] = 8

    @model_validator(mode="after")
    def _check_stop_on(self) -> DiffusionOptions:
        if self.stop_on == "heldout_loss" and not (self.heldout_fraction and self.patience):
            raise ValueError(
                "stop_on heldout_loss needs heldout_fraction > 0 and patience > 0, "
                f"but got ({self.heldout_fraction:g}, {self.patience}); stop_on none runs all steps"
            )
        return self


class DiffusionSampling(SamplingOptions):
    """How latents are sampled: `sampler` is one of SAMPLERS, `auto` the first that can follow the objective;
    `sampling_steps` are denoiser calls, 0 for as many as there are timesteps."""

    sampler: str = "auto"
    sampling_steps: Annotated[int, Field(ge=0)] = 20


class TrajectoryOptions(Section):
    """With `trajectory_every` > 0 the first `trajectory_count` samples are also kept at intermediate timesteps: after
    every `trajectory_every` denoiser calls."""

    trajectory_every: Annotated[int, Field(ge=0)] = 0
    trajectory_count: Positive = 16


class ControlOptions(Section):
    """Where `generator.condition` has `val_accuracy`, `control_count` networks beside the others are asked for low to
    high accuracies, to see whether they have them."""

    control_count: Annotated[int, Field(ge=0)] = 100


class LatentDiffusionOptions(GeneratorOptions):
    """Standardise, compress, diffuse (arXiv 2402.13144, section 3): `autoencoder` compresses, `denoiser` predicts what
    `objective` says, and `diffusion` is how it is trained."""

    implementation: ClassVar[Any] = "pdiff.method.generators.latent_diffusion:LatentDiffusion"
    sampling: ClassVar[type[SamplingOptions]] = DiffusionSampling
    extras: ClassVar[tuple[type[Section], ...]] = (TrajectoryOptions,)
    sections: ClassVar[dict[str, tuple[type[Section], ...]]] = {"autoencoder": (), "diffusion": ()}
    logs: ClassVar[tuple[str, ...]] = (
        *("autoencoder/loss", "diffusion/loss", "diffusion/heldout_loss", "latent_size"),
        *("diffusion/dispersion", "diffusion/nearest_ratio", "diffusion/final_dispersion"),
        "diffusion/final_nearest_ratio",
        *names_of_measured("autoencoder", "diffusion"),
    )

    autoencoder: SerializeAsAny[Section] = PCAOptions()
    denoiser: SerializeAsAny[DenoiserOptions] = MLPDenoiserOptions()
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

    The covariance is that of as many principal components as explain the share `variance` of the total variance; with
    `diagonal` every parameter is independent of the others, and `variance` has no effect.
    """

    implementation: ClassVar[Any] = "pdiff.method.generators.gaussian:Gaussian"
    logs: ClassVar[tuple[str, ...]] = ("latent_size", *names_of_measured("gaussian"))

    scale: NonNegative = 1.0
    diagonal: bool = False
    variance: Annotated[float, Field(gt=0, le=1)] = 1.0


class NeuronsTraining(DiffusionOptions):
    """Training of the denoiser of tokens; all keys are those of DiffusionOptions, with other defaults: `steps`,
    `learning_rate`, `batch_size`, `evaluate_every`, `stop_on`."""

    steps: Annotated[int, Field(ge=1)] = 3000
    learning_rate: Rate = 2e-3
    batch_size: Positive = 96
    evaluate_every: Positive = 250
    stop_on: Literal["heldout_loss", "memorising", "none"] = "none"


class Behaviour(Section):
    """With `behaviour` > 0 the loss has a second term, of this weight: how far the outputs of denoised networks are
    from those of the same networks without noise, on `behaviour_images` training images, others in every step. It tells
    the denoiser which numbers matter."""

    behaviour: NonNegative = 0.0
    behaviour_images: Positive = 64


class NeuronsSampling(DiffusionSampling):
    """As for latents, `sampler` and `sampling_steps`, with another default. `condition` are the values that networks
    are asked to have in the columns of `generator.condition`; absent ones are the 95th percentile of the fitted
    networks. `guidance` w extrapolates from the unconditional prediction (Ho and Salimans 2022, arXiv 2207.12598): 0 is
    without condition, 1 is plain conditioning, above 1 conditions count for more."""

    sampling_steps: Annotated[int, Field(ge=0)] = 4
    condition: dict[str, float] = {}
    guidance: NonNegative = 1.0


class Tokenization(Section):
    """What the denoiser sees of a network. With `balance` its units are scaled to equal norms where they are computed
    and where they are read, as far as that changes no prediction. `condition` are columns of numbers in the description
    of the population, such as `val_accuracy`, on which networks are conditioned."""

    balance: bool = True
    condition: Annotated[tuple[str, ...], Several] = ()

    @field_validator("condition")
    @classmethod
    def _check_condition(cls, condition: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(condition)) < len(condition):
            raise ValueError(f"a column stands twice: {list(condition)}")
        return condition


class NeuronsOptions(GeneratorOptions):
    """A diffusion of neurons: `tokens` are the units of a network, with their weights; `denoiser` is a transformer
    that does not know their order and predicts what `objective` says, `diffusion` is how it is trained, and `behaviour`
    a term of its loss."""

    implementation: ClassVar[Any] = "pdiff.method.generators.neurons:Neurons"
    sampling: ClassVar[type[SamplingOptions]] = NeuronsSampling
    extras: ClassVar[tuple[type[Section], ...]] = (TrajectoryOptions, ControlOptions)
    sections: ClassVar[dict[str, tuple[type[Section], ...]]] = {
        "generator": (Tokenization, GraphDenoiserOptions),
        "diffusion": (NeuronsTraining, Behaviour),
    }
    settles: ClassVar[tuple[str, ...]] = ("diffusion.denoiser",)
    needs: ClassVar[tuple[str, ...]] = ("groups",)
    logs: ClassVar[tuple[str, ...]] = (
        *("diffusion/loss", "diffusion/heldout_loss", "latent_size"),
        *("diffusion/dispersion", "diffusion/nearest_ratio", "diffusion/final_dispersion"),
        "diffusion/final_nearest_ratio",
        *names_of_measured("diffusion"),
    )

    tokens: Tokenization = Tokenization()
    denoiser: GraphDenoiserOptions = GraphDenoiserOptions()
    objective: SerializeAsAny[Objective] = Flow()
    diffusion: DiffusionOptions = NeuronsTraining()
    behaviour: Behaviour = Behaviour()

    @property
    def columns(self) -> tuple[str, ...]:
        return self.tokens.condition

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs, *(["outputs"] if self.behaviour.behaviour else []))

    @classmethod
    def of(cls, generator: Section, *, diffusion: Any) -> NeuronsOptions:
        return cls(
            tokens=generator.part(Tokenization),
            denoiser=generator.part(GraphDenoiserOptions),
            objective=diffusion.part(OBJECTIVES[diffusion.prediction]),
            diffusion=diffusion.part(NeuronsTraining),
            behaviour=diffusion.part(Behaviour),
        )


GENERATORS: dict[str, type[GeneratorOptions]] = {
    "latent_diffusion": LatentDiffusionOptions,
    "gaussian": GaussianOptions,
    "neurons": NeuronsOptions,
}
