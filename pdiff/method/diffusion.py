"""Diffusion: the denoising loss, the training of a denoiser, and sampling."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.method.log import Log, Point
from pdiff.method.objectives import Objective
from pdiff.method.samplers import SAMPLERS
from pdiff.method.training import Batches, Best, Trainer, follow, shuffled_rows

if TYPE_CHECKING:
    from pdiff.method.generators import DiffusionOptions

HELDOUT_BATCH = 256  # noisy latents that the denoiser takes at a time


def denoising_loss(objective: Objective, denoiser: nn.Module, z: Tensor) -> Tensor:
    """Mean squared error of the prediction from latents z (B, L) with noise at random positions, a scalar."""
    z_t, t, target = objective.add_noise(z, torch.randn_like(z), torch.rand_like(z[:, 0]))
    return F.mse_loss(denoiser(z_t, t), target)


@torch.no_grad()
def heldout_loss(objective: Objective, denoiser: nn.Module, z: Tensor, *, repeats: int = 32) -> float:
    """Denoising error of latents (B, L), each at `repeats` evenly spaced positions; the same noise at every call."""
    generator = torch.Generator().manual_seed(0)
    z = z.repeat(repeats, 1)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    u = ((torch.randperm(len(z), generator=generator) + 0.5) / len(z)).to(z.device)
    z_t, t, target = objective.add_noise(z, noise, u)
    batches = zip(z_t.split(HELDOUT_BATCH), t.split(HELDOUT_BATCH), strict=True)
    return F.mse_loss(torch.cat([denoiser(*batch) for batch in batches]), target).item()


def trainer(
    denoiser: nn.Module, batches: Batches, objective: Objective, options: DiffusionOptions, *, seed: int
) -> Trainer:
    """Trains a denoiser on batches of latents (B, L)."""

    def loss(z: Tensor) -> Tensor:
        return denoising_loss(objective, denoiser, z)

    return Trainer(denoiser, loss, batches, options, steps=options.steps, seed=seed, ema=options.ema, autocast=True)


def fit(
    denoiser: nn.Module,
    objective: Objective,
    z: Tensor,
    heldout: Tensor,
    options: DiffusionOptions,
    *,
    seed: int,
    log: Log,
    path: Path | None = None,
) -> nn.Module:
    """Train a denoiser on latents z (N, L), on its device, watching its loss on held-out ones (M, L); M may be 0.

    Returns:
        The averaged denoiser in evaluation mode; with `patience` the best one on the held-out latents, when so many
        evaluations in a row were no better.
    """
    steps = trainer(denoiser.train(), shuffled_rows(z, options.batch_size, seed), objective, options, seed=seed)
    best = Best()
    for step in follow(steps, "diffusion/loss", log, path=path, beside=(best,)):
        if len(heldout) and step.number % options.evaluate_every == 0:
            loss = heldout_loss(objective, steps.averaged.eval(), heldout)
            denoiser.train()
            best.update(-loss, steps.averaged)
            log(Point("diffusion/heldout_loss", loss, step.number))
            if options.patience and best.misses >= options.patience:
                break
    fitted = steps.averaged
    if options.patience:
        best.restore(fitted)
    return fitted.eval()


def gaussian_noise(size: int, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Noise of N(0, 1), a row for each seed, (len(seeds), size), and the generators that it came from, to go on with.

    Computed on the CPU, so that it is the same for every device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(size, generator=generator) for generator in generators]), generators


class Sampling:
    """Samples latents by a sampler: iterating yields z_t on its way from noise to data, and its timestep t.

    The first z_t is noise; the last one, at t = 0, are the samples. There are len(self) of them. Latent k depends on
    seed k alone, whatever the batch.

    Args:
        objective: what the denoiser predicts.
        denoiser: in evaluation mode, on `device`.
        size: L.
        seeds: one for each latent.
        sampler: a name in `SAMPLERS` whose paths include the objective's.
        steps: denoiser calls, at most.
        device: where to compute.
    """

    def __init__(
        self,
        objective: Objective,
        denoiser: nn.Module,
        size: int,
        seeds: Sequence[int],
        *,
        sampler: str,
        steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.denoiser = denoiser
        self.scheduler = SAMPLERS[sampler].prepared(objective, steps, device)
        noise, self.generators = gaussian_noise(size, seeds)
        self.noise = noise.to(device)

    def __len__(self) -> int:
        return len(self.scheduler.timesteps) + 1

    @torch.inference_mode()
    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        z = self.noise
        for t in self.scheduler.timesteps:
            yield float(t), z
            prediction = self.denoiser(z, t.expand(len(z)))
            z = self.scheduler.step(prediction, t, z, generator=self.generators).prev_sample
        yield 0.0, z

    def samples(self) -> Tensor:
        """The samples, float32 (len(seeds), L)."""
        return deque(self, maxlen=1).pop()[1]
