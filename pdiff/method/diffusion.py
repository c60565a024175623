"""Diffusion: the denoising loss, the training of a denoiser, and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff.method.log import Log, Point
from pdiff.method.objectives import Objective
from pdiff.method.samplers import SAMPLERS, samplers_of
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
    """The training of a denoiser on batches of latents (B, L)."""

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
    """Train a denoiser on latents z (N, L), and evaluate its loss on held-out ones (M, L); M may be 0.

    Args:
        denoiser: untrained, on the device of the latents.
        objective: what it predicts.
        z: latents that it is trained on.
        heldout: latents that it is evaluated on.
        options: of the training.
        seed: of batches and noise.
        log: receives `diffusion/loss` and `diffusion/heldout_loss`.
        path: file of the training state, from which an interrupted training resumes.

    Returns:
        The moving average of the denoiser in evaluation mode: the last one, or, with `options.patience`, the one with
        the lowest held-out loss.
    """
    steps = trainer(denoiser.train(), shuffled_rows(z, options.batch_size, seed), objective, options, seed=seed)
    best = Best()
    for step in follow(steps, "diffusion/loss", log, path=path, beside=(best,)):
        if len(heldout) and step.number % options.evaluate_every == 0:
            loss = heldout_loss(objective, steps.averaged.eval(), heldout)
            denoiser.train()
            best.update(-loss, steps.averaged)
            log(Point("diffusion/heldout_loss", loss, step.number))
            if options.patience and best.since_best >= options.patience:
                break
    if options.patience:
        best.restore(steps.averaged)
    return steps.averaged.eval()


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
        steps: denoiser calls, at most; between 1 and the objective's timesteps.
        device: where to compute.

    Raises:
        ValueError: the sampler is unknown or cannot follow the objective; too few or too many steps.
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
        if sampler not in (known := samplers_of(objective)):
            raise ValueError(
                f"sampler {sampler!r} cannot follow the path {objective.path}, expected one of {', '.join(known)}"
            )
        if not 1 <= steps <= objective.timesteps:
            raise ValueError(f"1 <= steps <= timesteps must hold, but got ({steps}, {objective.timesteps})")
        self.denoiser = denoiser
        self.scheduler = SAMPLERS[sampler].prepared(objective, steps, device)
        noise, self.generators = gaussian_noise(size, seeds)
        self.noise = noise.to(device)

    def __len__(self) -> int:
        return len(self.scheduler.timesteps) + 1

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        z = self.noise
        for t in self.scheduler.timesteps:
            yield float(t), z
            prediction = self.denoiser(z, t.expand(len(z)))
            z = self.scheduler.step(prediction, t, z, generator=self.generators).prev_sample
        yield 0.0, z

    def samples(self, label: str = "sample") -> Tensor:
        """The samples, float32 (len(seeds), L), with a progress bar."""
        z = self.noise
        for _, z in tqdm(self, desc=label, unit="step", disable=None):  # noqa: B007
            pass
        return z
