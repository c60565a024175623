"""What generators with a denoiser share: its training with previews, and sampling from noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff.method import diffusion
from pdiff.method.generators import DiffusionOptions
from pdiff.method.generators.base import Generator
from pdiff.method.log import Log, measured
from pdiff.method.objectives import OBJECTIVES, Objective
from pdiff.method.samplers import samplers_of
from pdiff.method.vectors import Matrix
from pdiff.seeds import stream

CHECKED, CHECKED_CALLS = 128, 20  # samples of the fitted denoiser that are looked at, and their denoiser calls


class DenoisingGenerator(Generator):
    """Networks from noise, by a denoiser of latents (B, L); kinds differ in what the latents are.

    Attributes:
        denoiser: predicts in latent space, in units of the latents' deviation; None: latents are sampled from N(0, 1).
        objective: what the denoiser predicts.
        diagnostics: of the denoiser, as fitted; not saved.
    """

    denoiser: nn.Module | None
    objective: Objective

    @property
    @abstractmethod
    def latent_size(self) -> int:
        """L."""

    @abstractmethod
    def decode(self, z: Tensor) -> Matrix:
        """Vectors (B, D), on the CPU, of latents in the scale of the denoiser, (B, L), on any device."""

    def sample_vectors(
        self, seeds: list[int], *, device: torch.device | str, label: str = "sample", **options: Any
    ) -> Matrix:
        if self.denoiser is None:
            z, _ = diffusion.gaussian_noise(self.latent_size, seeds)
            return self.decode(z.to(device))
        return self.decode(self.sampling(seeds, device=device, **options).samples(label))

    def sampling(
        self, seeds: list[int], *, device: torch.device | str, sampler: str = "auto", sampling_steps: int = 20
    ) -> diffusion.Sampling:
        """The latents of some seeds on their way from noise to data; the options are those of `DiffusionSampling`.

        Raises:
            ValueError: there is no denoiser, the sampler cannot follow the objective, or there are too many steps.
        """
        if self.denoiser is None:
            raise ValueError("the generator has no denoiser (its diffusion has 0 steps), so samples have no trajectory")
        name = samplers_of(self.objective)[0] if sampler == "auto" else sampler
        steps = sampling_steps or self.objective.timesteps
        parts = (self.objective, self.denoiser.to(device).eval(), self.latent_size, seeds)
        return diffusion.Sampling(*parts, sampler=name, steps=steps, device=device)

    def warm_up(self, **options: Any) -> None:
        if self.denoiser is not None:
            self.sampling([0], device="cpu", **options)  # imports diffusers

    def sizes(self) -> dict[str, float]:
        return {"latent_size": self.latent_size}

    def modules(self) -> dict[str, tuple[nn.Module, int]]:
        return {} if self.denoiser is None else {"diffusion": (OneInput(self.denoiser), self.latent_size + 1)}

    @torch.no_grad()
    def trajectory(
        self,
        count: int,
        *,
        every: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        label: str = "trajectory",
        **options: Any,
    ) -> Iterator[tuple[float, Any]]:
        """Yield the first samples of a seed on their way: timestep, and the networks that noisy latents decode to.

        Args:
            count: how many networks.
            every: yield the networks after every so many denoiser calls; the samples, at timestep 0, come last.
            seed: of the sampling.
            device: where to compute.
            label: of the progress bar.
            options: of `sampling`.

        Raises:
            ValueError: as `sampling`.
        """
        steps = self.sampling([stream(seed, k) for k in range(count)], device=device, **options)
        latents: dict[float, Tensor] = {}
        for call, (t, z) in enumerate(tqdm(steps, desc=label, unit="step", disable=None)):
            if call % every == 0 or call == len(steps) - 1:
                latents[t] = z  # Heun's method visits most timesteps twice: the second z counts
        for t, z in latents.items():
            yield t, self.standardizer.decode(self.decode(z))

    def objective_config(self) -> dict[str, Any]:
        """The objective as plain data."""
        prediction = next(name for name, kind in OBJECTIVES.items() if type(self.objective) is kind)
        return {"prediction": prediction, **self.objective.model_dump()}


def objective_from(config: dict[str, Any]) -> Objective:
    """The inverse of `objective_config`."""
    options = dict(config)
    return OBJECTIVES[options.pop("prediction")](**options)


def fit_denoiser(
    build: Callable[[], nn.Module],
    objective: Objective,
    z: diffusion.Rows,
    heldout: diffusion.Batch,
    options: DiffusionOptions,
    *,
    fitted: Tensor,
    seed: int,
    device: torch.device | str,
    log: Log,
    state: Path | None,
    view: Callable[[Tensor], Tensor] | None = None,
    term: diffusion.Term | None = None,
) -> tuple[nn.Module, diffusion.Diagnostics]:
    """Train a denoiser, and look at its samples.

    Args:
        build: makes the untrained denoiser.
        objective: what it predicts.
        z: latents that it is trained on, see `diffusion.fit`.
        heldout: latents that it is evaluated on.
        options: of the training.
        fitted: latents that samples are compared with, (n, L): those of z, or some of them.
        seed: of the whole generator.
        device: where to train.
        log: receives losses and diagnostics.
        state: a folder of this fit alone, from whose file `diffusion.pt` it resumes.
        view: latents (B, L) -> rows as they are compared, see `diffusion.Preview`.
        term: of the loss, see `diffusion.denoising_loss`.
    """
    seed = stream(seed, "denoiser")
    preview = diffusion.Preview(objective, fitted, seed=seed, view=view)
    with measured(log, "diffusion"):
        torch.manual_seed(seed)
        resume = {"log": log, "path": state and state / "diffusion.pt"}
        data = (build().to(device), objective, z, heldout, options)
        denoiser = diffusion.fit(*data, seed=seed, preview=preview, term=term, **resume)
    checked = diffusion.Preview(objective, fitted, seed=seed, samples=CHECKED, calls=CHECKED_CALLS, view=view)
    return denoiser, checked(denoiser)


class OneInput(nn.Module):
    """A denoiser with one input: latents and, as the last column, timesteps, (B, L + 1) -> prediction (B, L)."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, rows: Tensor) -> Tensor:
        return self.denoiser(rows[:, :-1], rows[:, -1])
