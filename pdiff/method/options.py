"""TODO method.options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Several = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))  # one is several, too
Seed = Annotated[int, Field(ge=0, lt=2**32)]

SAMPLERS_OF = {
    "flow": ("heun", "euler", "dpmsolver++"),
    "epsilon": ("ddpm", "ddim", "dpmsolver++"),
    "sample": ("ddpm", "ddim", "dpmsolver++"),
    "v_prediction": ("ddpm", "ddim", "dpmsolver++"),
}
"""Prediction -> samplers that can follow it; the first is the default."""


def neutral(default: Any, **options: Any) -> Any:
    """A field that cannot change a result (a place, a device, a batch size of inference): not part of any digest."""
    return Field(default, json_schema_extra={"neutral": True}, **options)


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Optimization(Section):
    """How something is trained. `one_cycle` also cycles the momentum (Adam's first beta), as PyTorch's does;
    `final_learning_rate` is where `cosine` ends."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Rate = 1e-3
    weight_decay: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    final_learning_rate: NonNegative = 0.0
    batch_size: Positive = 128


class Autoencoder(Optimization):
    """Vectors <-> latents, fitted on the first `checkpoints` of the collection, 0 for all. The fields of training
    concern `conv` alone, `variance` the automatic size of `pca`; `kl_weight` > 0 makes `conv` variational."""

    checkpoints: Annotated[int, Field(ge=0)] = 0
    kind: Literal["pca", "conv"] = "pca"
    latent_size: Positive | Literal["auto"] = "auto"
    variance: Annotated[float, Field(gt=0, le=1)] = 0.999
    parameter_noise: NonNegative = 0.001
    latent_noise: NonNegative = 0.1
    kl_weight: NonNegative = 0.0
    steps: Positive = 500
    learning_rate: Rate = 2e-5
    batch_size: Positive = 50
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.02
    on_accuracy_drop: Literal["warn", "stop"] = "warn"

    @model_validator(mode="after")
    def _check(self) -> Autoencoder:
        if self.kind == "conv" and self.latent_size == "auto":
            raise ValueError("latent_size 'auto' needs kind pca; kind conv needs a number, such as 128")
        return self


class DiffusionSettings(Optimization):
    """Latent diffusion; with `steps` 0 there is none, and latents are drawn from a Gaussian.

    `heldout_fraction` of the checkpoints is kept from the fit; with `patience` > 0 training stops after as many
    evaluations of their loss (every `evaluate_every` steps) without a better one, and keeps the best.
    """

    denoiser: Literal["mlp", "conv"] = "mlp"
    width: Positive = 256
    blocks: Positive = 3
    prediction: Literal["flow", "epsilon", "sample", "v_prediction"] = "flow"
    timesteps: Positive = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
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
    def _check(self) -> DiffusionSettings:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start <= beta_end must hold, but got ({self.beta_start}, {self.beta_end})")
        if self.patience and not self.heldout_fraction:
            raise ValueError("patience > 0 needs heldout_fraction > 0: early stopping watches held-out checkpoints")
        return self
