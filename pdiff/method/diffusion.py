"""Latent diffusion: what the denoiser learns, and how latents are drawn with the schedulers of `diffusers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.parallel.ranks import own

HELDOUT_BATCH = 256  # noisy latents that the denoiser takes at a time


def gaussian(latent_size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Numbers of N(0, 1), a row for each generator, (len(generators), latent_size)."""
    return torch.stack([torch.randn(latent_size, generator=generator) for generator in generators])


class Diffusion:
    """A path from latents z_0 to noise, and the quantity that a denoiser predicts along it.

    Args:
        prediction: "epsilon", "sample" or "v_prediction" along the DDPM path (Ho et al. 2020, eq. 4)
            z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps with linear betas; or "flow" along straight paths
            (Lipman et al. 2023) z_t = (1 - s) z_0 + s eps with s = t / timesteps, target eps - z_0.
        timesteps: T.
        beta_start: first beta of the DDPM path.
        beta_end: last beta of the DDPM path.
    """

    def __init__(
        self, prediction: str, *, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        self.prediction, self.timesteps = prediction, timesteps
        self.beta_start, self.beta_end = beta_start, beta_end
        self.options = {
            "prediction": prediction,
            "timesteps": timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        self.alpha_bar = (1 - torch.linspace(beta_start, beta_end, timesteps)).cumprod(0)

    def corrupt(self, z: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their timesteps, and what to predict of them.

        Args:
            z: latents z_0 (B, L).
            noise: eps (B, L).
            u: position on the path in [0, 1), (B,).

        Returns:
            z_t (B, L), t (B,) in [0, T), target (B, L).
        """
        if self.prediction == "flow":
            return z + u[:, None] * (noise - z), u * self.timesteps, noise - z
        t = (u * self.timesteps).long()
        alpha_bar = self.alpha_bar.to(z.device)[t][:, None]
        signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        targets = {"epsilon": noise, "sample": z, "v_prediction": signal * noise - spread * z}
        return signal * z + spread * noise, t, targets[self.prediction]

    def loss(self, denoiser: nn.Module, z: Tensor, *, count: int | None = None) -> Tensor:
        """Denoising error of latents (B, L) at random positions, a scalar.

        Args:
            denoiser: in training mode.
            z: this process's rows of a batch.
            count: rows of the batch over all processes; absent where there is one.
        """
        z_t, t, target = self.corrupt(z, own(torch.randn, z, count), own(torch.rand, z[:, 0], count))
        return F.mse_loss(denoiser(z_t, t), target)

    @torch.no_grad()
    def heldout_loss(self, denoiser: nn.Module, z: Tensor, *, draws: int = 32) -> float:
        """Denoising error of latents (B, L), each at `draws` evenly spaced positions with the same noise every time."""
        generator = torch.Generator().manual_seed(0)
        z = z.repeat(draws, 1)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        u = ((torch.randperm(len(z), generator=generator) + 0.5) / len(z)).to(z.device)
        z_t, t, target = self.corrupt(z, noise, u)
        batches = zip(z_t.split(HELDOUT_BATCH), t.split(HELDOUT_BATCH), strict=True)
        return F.mse_loss(torch.cat([denoiser(*batch) for batch in batches]), target).item()

    @torch.inference_mode()
    def sample(
        self,
        denoiser: nn.Module,
        latent_size: int,
        seeds: Sequence[int],
        *,
        sampler: str,
        steps: int,
        device: torch.device | str = "cpu",
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
        visit: Callable[[float, Tensor], object] = lambda t, z: None,
    ) -> Tensor:
        """Draw one latent for each seed, (len(seeds), L), float32.

        Args:
            denoiser: in evaluation mode, on `device`.
            latent_size: L.
            seeds: a seed of its own for every latent, so that none depends on its batch.
            sampler: one of `SAMPLERS_OF[prediction]`.
            steps: denoiser calls, at most.
            device: where to compute; the random numbers are drawn on the CPU, the same for every device.
            progress: wraps the timesteps, e.g. in a progress bar.
            visit: told every noisy latent z_t, and its timestep t, before the denoiser meets it.
        """
        scheduler = self.scheduler(sampler)
        if self.prediction == "flow":
            scheduler.set_timesteps((steps + 1) // 2 if sampler == "heun" else steps, device=device)
            # the exact positions: DPM-Solver cuts them to integers
            scheduler.timesteps = (scheduler.sigmas[:-1] * self.timesteps).to(device)
        else:  # begin at pure noise, whatever the number of steps; asked for a number, diffusers may add a timestep -1
            spaced = [round(self.timesteps * k / steps) - 1 for k in range(steps, 0, -1)]
            scheduler.set_timesteps(timesteps=spaced, device=device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        z = gaussian(latent_size, generators).to(device)
        for t in progress(scheduler.timesteps):
            visit(float(t), z)
            z = scheduler.step(denoiser(z, t.expand(len(z))), t, z, generator=generators).prev_sample
        return z

    def scheduler(self, sampler: str) -> Any:
        """The scheduler of `diffusers` that a sampler's name stands for."""
        import diffusers  # takes seconds

        if sampler == "heun":
            return diffusers.FlowMatchHeunDiscreteScheduler(self.timesteps)
        if sampler == "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler(self.timesteps)
        flow = self.prediction == "flow"
        options: dict[str, Any] = {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "prediction_type": "flow_prediction" if flow else self.prediction,
        }
        if sampler == "ddpm":
            return diffusers.DDPMScheduler(**options, clip_sample=False)
        # DDIM is the solver's first order; DDIMScheduler itself goes astray where steps do not divide the timesteps
        order = {"ddim": 1, "dpmsolver++": 2}[sampler]
        return diffusers.DPMSolverMultistepScheduler(**options, solver_order=order, use_flow_sigmas=flow)
