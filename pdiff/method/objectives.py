"""Objectives: a path from data to noise, and the quantity that a denoiser predicts along it. OBJECTIVES lists them.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from pdiff.method.options import Positive, Probability, Section

if TYPE_CHECKING:
    from torch import Tensor


class Objective(Section):
    """A path from data, at timestep 0, to noise, at timestep T = `timesteps`.

    Attributes:
        path: its name, by which samplers say that they can follow it.
        prediction_type: what diffusers calls the predicted quantity.
    """

    path: ClassVar[str]
    prediction_type: ClassVar[str]

    timesteps: Positive = 1000

    def add_noise(self, z: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their timesteps, and what to predict of them.

        Args:
            z: latents z_0 (B, L).
            noise: eps (B, L).
            u: position on the path in [0, 1), (B,).

        Returns:
            z_t (B, L), t (B,) in [0, T), target (B, L).
        """
        raise NotImplementedError

    def denoised(self, z_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """z_0 as a prediction from z_t at timesteps t (B,) says it is, (B, L)."""
        raise NotImplementedError

    def scheduler_options(self) -> dict[str, Any]:
        """What a scheduler of diffusers must know of the path."""
        return {"num_train_timesteps": self.timesteps, "prediction_type": self.prediction_type}


class Flow(Objective):
    """Straight paths (Lipman et al. 2023, arXiv 2210.02747), z_t = (1 - s) z_0 + s eps, s = t / T; target eps - z_0."""

    path: ClassVar[str] = "flow"
    prediction_type: ClassVar[str] = "flow_prediction"

    def add_noise(self, z: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return z + u[:, None] * (noise - z), u * self.timesteps, noise - z

    def denoised(self, z_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return z_t - t[:, None] / self.timesteps * prediction


class Epsilon(Objective):
    """The DDPM path (Ho et al. 2020, eq. 4), z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps; target eps.

    a_t is the product of 1 - beta up to t, where beta rises linearly from `beta_start` to `beta_end`.
    """

    path: ClassVar[str] = "ddpm"
    prediction_type: ClassVar[str] = "epsilon"

    beta_start: Probability = 1e-4
    beta_end: Probability = 0.02

    @model_validator(mode="after")
    def _check_betas(self) -> Epsilon:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start <= beta_end must hold, but got ({self.beta_start}, {self.beta_end})")
        return self

    @property
    def alpha_bar(self) -> Tensor:
        """a_t = prod (1 - beta_s) over s <= t, float32 (T,)."""
        import torch

        return (1 - torch.linspace(self.beta_start, self.beta_end, self.timesteps)).cumprod(0)

    def add_noise(self, z: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (u * self.timesteps).long()
        signal, spread = self._factors(t)
        return signal * z + spread * noise, t, self.target(z, noise, signal, spread)

    def denoised(self, z_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return self.source(z_t, prediction, *self._factors(t))

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of z_0 and of the noise at timesteps (B,), (B, 1) each."""
        alpha_bar = self.alpha_bar.to(t.device)[t][:, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def target(self, z: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """What is predicted of z_t = signal z + spread noise, (B, L)."""
        return noise

    def source(self, z_t: Tensor, prediction: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """z_0, given z_t and the target, (B, L)."""
        return (z_t - spread * prediction) / signal

    def scheduler_options(self) -> dict[str, Any]:
        return super().scheduler_options() | {"beta_start": self.beta_start, "beta_end": self.beta_end}


class Sample(Epsilon):
    """The DDPM path; target z_0."""

    prediction_type: ClassVar[str] = "sample"

    def target(self, z: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return z

    def source(self, z_t: Tensor, prediction: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return prediction


class Velocity(Epsilon):
    """The DDPM path; target v = sqrt(a_t) eps - sqrt(1 - a_t) z_0 (Salimans and Ho 2022, appendix D)."""

    prediction_type: ClassVar[str] = "v_prediction"

    def target(self, z: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return signal * noise - spread * z

    def source(self, z_t: Tensor, prediction: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return signal * z_t - spread * prediction


OBJECTIVES: dict[str, type[Objective]] = {
    "flow": Flow,
    "epsilon": Epsilon,
    "sample": Sample,
    "v_prediction": Velocity,
}
